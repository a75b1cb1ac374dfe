"""Tests that pictures are converted to what a person sees."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from rl.pixels import FIRST, ON_WHITE, PROFILE, SCALED, TURNED
from rl.types import Picture
from tests.support.photos import arrow, encoded, stored


def shown(url: str) -> Image.Image:
    """The pixels of a data URL, as a program shows them that knows nothing of EXIF."""
    import base64

    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


@pytest.mark.parametrize("value", range(1, 9))
def test_a_photo_is_upright_in_every_orientation_of_exif(value: int) -> None:
    picture = Picture.of(stored(value))
    assert picture.size == picture.load().size == shown(picture.data_url).size == (40, 20)
    pixels = np.asarray(picture.load(), dtype=int)
    assert pixels[4, 8, 1] < 80 and pixels[4, 32, 1] > 180 and pixels[15, 8, 1] > 180  # red is in the upper left
    assert picture.check() == ((TURNED,) if value != 1 else ())
    assert np.abs(np.asarray(shown(picture.data_url), dtype=int) - pixels).max() < 2


def test_a_picture_that_is_not_to_be_turned_stays_as_it_is_stored_and_has_a_digest_of_its_own() -> None:
    turned, lying = Picture.of(stored(6)), Picture.of(stored(6), upright=False)
    assert (lying.size, lying.load().size, shown(lying.data_url).size, lying.check()) == ((20, 40),) * 3 + ((),)
    assert turned.digest != lying.digest
    assert Picture.of(stored(1)).digest == Picture.of(stored(1), upright=False).digest


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_ground_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 10))
    picture = Picture.of(encoded(image.convert(mode) if mode != "P" else image.quantize(4)))
    pixels = np.asarray(picture.load())
    assert pixels[5, 5].tolist() == [0, 0, 0] and pixels[5, 15].tolist() == [255, 255, 255]
    assert picture.check() == (ON_WHITE,)
    assert np.array_equal(np.asarray(shown(picture.data_url)), pixels)


def test_an_alpha_channel_without_transparency_changes_nothing() -> None:
    picture = Picture.of(encoded(arrow().convert("RGBA")))
    assert picture.check() == ()
    assert np.array_equal(np.asarray(picture.load()), np.asarray(arrow()))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(1000, 3000, 200, dtype=np.uint16), "PNG"),
        (np.linspace(0, 2**20, 200, dtype=np.int32), "TIFF"),
        (np.linspace(-0.5, 0.25, 200, dtype=np.float32), "TIFF"),
    ],
)
def test_grey_values_of_more_than_8_bits_are_scaled_to_their_own_range(values: np.ndarray, kind: str) -> None:
    picture = Picture.of(encoded(Image.fromarray(values.reshape(10, 20)), kind))
    pixels = np.asarray(picture.load())
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)
    assert abs(int(pixels.mean()) - 127) < 3
    assert picture.check() == (SCALED,)


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (700, 255)])
def test_a_grey_picture_with_one_value_is_black_or_white(value: int, grey: int) -> None:
    picture = Picture.of(encoded(Image.fromarray(np.full((10, 20), value, dtype=np.uint16))))
    assert np.unique(np.asarray(picture.load())).tolist() == [grey]


def test_values_that_are_not_finite_count_as_the_darkest() -> None:
    values = np.array([[np.nan, np.inf], [1.0, 2.0]], dtype=np.float32)
    assert np.asarray(Picture.of(encoded(Image.fromarray(values), "TIFF")).load())[..., 0].tolist() == [
        [0, 0],
        [0, 255],
    ]


def test_a_cmyk_picture_is_converted_and_its_profile_is_used_if_it_has_one() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert Picture.of(encoded(image, "JPEG")).load().getpixel((4, 4)) == image.convert("RGB").getpixel((4, 4))
    broken = Picture.of(encoded(image, "JPEG", icc_profile=b"no profile"))
    assert (broken.check(), broken.load().mode) == ((PROFILE,), "RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # a profile for RGB does not fit
    assert Picture.of(encoded(image, "JPEG", icc_profile=srgb)).load().mode == "RGB"


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    file = tmp_path / "two.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    picture = Picture.of(file)
    assert picture.check() == (FIRST,)
    assert picture.load().getpixel((3, 3)) == (255, 0, 0)
    assert picture.data_url.startswith("data:image/png")
