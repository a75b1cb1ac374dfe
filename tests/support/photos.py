"""Pictures as cameras store them, for tests."""

import io
from typing import Any

from PIL import Image

from rl.pixels import ORIENTATION


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def arrow() -> Image.Image:
    """A picture of 40 x 20 pixels whose upper left quarter is red."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 10))
    return image


def stored(value: int) -> bytes:
    """The picture `arrow` as a camera stores it: turned, with the EXIF tag that undoes the turn."""
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[value]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return encoded(arrow().transpose(back) if back is not None else arrow(), "JPEG", exif=exif, quality=95)
