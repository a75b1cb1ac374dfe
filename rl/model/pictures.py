"""Converts pictures to the square views that STEP3-VL's vision tower encodes.

A picture becomes one global view and, if it is large or far from square, a grid of crops. The thresholds for 728-pixel
views and 504-pixel crops are taken from the published serving code. For other sizes of views, the thresholds are scaled
in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rl.model.layout import CropGrid, crop_grid, resized, squared

# The mean and the standard deviation of each colour channel. The values are taken from CLIP.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@dataclass(frozen=True)
class Views:
    """The normalised views of one picture. Each view is [3, side, side] float32."""

    global_view: Tensor
    crops: tuple[Tensor, ...]


def pixels(picture: Image.Image, side: int) -> Tensor:
    """Normalises a picture, then resizes it to [3, side, side] (bilinear, antialiased)."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    data = data.view(picture.height, picture.width, 3).permute(2, 0, 1).float().div(255)
    data = (data - MEAN) / STD
    if data.shape[-2:] == (side, side):
        return data.contiguous()
    return F.interpolate(data[None], size=(side, side), mode="bilinear", align_corners=False, antialias=True)[0]


def views(picture: Image.Image, global_size: int, crop_size: int) -> Views:
    """Returns the global view and the crops of an RGB picture. The crops are ordered row by row."""
    picture = _padded(picture)
    picture = picture.resize(resized(picture.size, global_size), Image.Resampling.BILINEAR)
    grid = crop_grid(picture.size, global_size, crop_size)
    return Views(pixels(picture, global_size), tuple(_crops(picture, grid, crop_size)))


def _padded(picture: Image.Image) -> Image.Image:
    size = squared(picture.size)
    if size == picture.size:
        return picture
    canvas = Image.new("RGB", size, 0)
    canvas.paste(picture, (0, 0))
    return canvas


def _crops(picture: Image.Image, grid: CropGrid, side: int) -> Sequence[Tensor]:
    if grid.window == 0:
        return []
    if grid.size != picture.size:
        picture = picture.resize(grid.size, Image.Resampling.BILINEAR)
    return [pixels(picture.crop(box), side) for box in grid.boxes()]
