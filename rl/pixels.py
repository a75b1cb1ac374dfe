"""Converts a decoded picture to what a person sees: 8-bit RGB, upright, on white ground.

The learner, the engines, the judges and everything that shows pictures use this conversion, through `Picture`.
"""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 0x0112  # number of the EXIF tag
TURNED, ON_WHITE, SCALED, PROFILE, FIRST = (
    "turned as EXIF says",
    "transparent, put on white",
    "with more than 8 bits per channel, scaled",
    "CMYK, converted by its colour profile",
    "animated, first frame used",
)
_TURNS = {  # value of the tag -> the turn that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)  # values of the tag that swap width and height


def orientation(image: Image.Image) -> int:
    """Returns the value of the EXIF tag `Orientation`, 1 to 8; 1 means upright. Only the header is read. The tag of a
    PNG counts only if it stands before the pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def seen_size(image: Image.Image, upright: bool) -> tuple[int, int]:
    """Returns (width, height) of the picture that `as_seen` returns, from the header."""
    width, height = image.size
    return (height, width) if upright and orientation(image) in _QUARTER_TURNS else (width, height)


def conversions(image: Image.Image, upright: bool) -> tuple[str, ...]:
    """Returns which conversions `as_seen` makes. Decodes the pixels only if the picture has an alpha channel."""
    found = {
        TURNED: upright and orientation(image) != 1,
        FIRST: bool(getattr(image, "is_animated", False)),
        SCALED: image.mode.startswith(("I", "F")),
        PROFILE: image.mode == "CMYK" and "icc_profile" in image.info,
        ON_WHITE: _has_alpha(image) and bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255),
    }
    return tuple(name for name, made in found.items() if made)


def as_seen(image: Image.Image, upright: bool = True) -> Image.Image:
    """Returns the picture in RGB. The first frame of an animation counts.

    Args:
        image: an opened picture.
        upright: if True, the picture is turned as its EXIF data say.
    """
    turned = orientation(image) if upright else 1
    if image.mode.startswith(("I", "F")):
        seen = _scaled(image)
    elif _has_alpha(image):
        layers = image.convert("RGBA")
        seen = Image.new("RGBA", layers.size, "white")
        seen.alpha_composite(layers)
    elif image.mode == "CMYK" and (profile := image.info.get("icc_profile")):
        seen = _by_profile(image, profile)
    else:
        seen = image
    seen = seen.convert("RGB")
    return seen.transpose(_TURNS[turned]) if turned != 1 else seen


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _scaled(image: Image.Image) -> Image.Image:
    """Scales grey values so that the darkest becomes black and the brightest becomes white. A picture with one value
    everywhere becomes black if the value is 0, else white."""
    grey = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(grey)
    low, high = (grey[finite].min(), grey[finite].max()) if finite.any() else (0.0, 0.0)
    if high == low:
        return Image.new("L", image.size, 255 if high > 0 else 0)
    unit = (np.where(finite, grey, low) - low) / (high - low)
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8))


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts a CMYK picture by its colour profile. If the profile cannot be used, converts it without."""
    try:
        converted: Any = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image
