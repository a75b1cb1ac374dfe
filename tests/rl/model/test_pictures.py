"""Tests the views of pictures: pixels are normalised, and the crops are in the order of the grid, row by row."""

import pytest
import torch
from PIL import Image

from rl.model.pictures import MEAN, STD, pixels, views


def test_pixels_are_normalised_and_resized():
    white = pixels(Image.new("RGB", (5, 7), "white"), 4)
    torch.testing.assert_close(white, ((1 - MEAN) / STD).expand(3, 4, 4))


def test_a_wide_picture_has_one_global_view_and_crops_row_by_row():
    picture = Image.new("RGB", (224, 112), "black")
    picture.paste("white", (112, 0, 224, 112))
    seen = views(picture, global_size=112, crop_size=56)
    # 224 x 112 pixels make 4 x 2 crops of 56 x 56 pixels. The left half is black, and the right half is white.
    assert seen.global_view.shape == (3, 112, 112)
    assert len(seen.crops) == 8 and all(crop.shape == (3, 56, 56) for crop in seen.crops)
    black, white = (float((level - MEAN[0]) / STD[0]) for level in (0, 1))
    assert [float(crop[0].mean()) for crop in seen.crops] == pytest.approx([black, black, white, white] * 2, abs=1e-5)


def test_a_thin_strip_is_padded_with_black_to_a_square():
    seen = views(Image.new("RGB", (100, 10), "white"), global_size=112, crop_size=56)
    assert float(seen.global_view[0, 0, 50]) > 0 > float(seen.global_view[0, -1, 50])
    assert seen.crops == ()
