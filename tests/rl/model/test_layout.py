"""Compares sizes of views and crops with values computed by hand."""

import pytest

from rl.model.layout import crop_grid, picture_tokens, picture_words, resized, squared

FULL = (728, 504, 169, 81)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        # A global view has 169 tokens, and a crop has 81 tokens. With a start token and an end token, the numbers are
        # 171 and 83.
        ((224, 224), 171),  # a small square picture has only the global view
        ((3024, 3024), 36 * 83 + 171 + 5),  # 6 x 6 crops, the global view, and 5 newline tokens between 6 rows
        ((728, 728), 4 * 83 + 171 + 1),  # 2 x 2 crops: 728 / 504 = 1.44 is rounded up to 2, because 0.44 > 0.2
        ((600, 300), 2 * 83 + 171),  # the sides are 2 : 1, so there is one row of 2 crops; a crop has 300 x 300 pixels
    ],
)
def test_pictures_take_as_many_tokens_as_the_published_code_says(size, tokens):
    assert picture_tokens(size, *FULL) == tokens


@pytest.mark.parametrize("size", [(224, 224), (1600, 900), (300, 1500), (4096, 2160), (31, 200)])
def test_the_words_of_a_picture_are_as_many_as_its_tokens(size):
    words = picture_words(size, *FULL)
    assert len(words) == picture_tokens(size, *FULL)
    views = "".join({"<patch_start>": "c", "<im_start>": "g", "<patch_newline>": "n"}.get(word, "") for word in words)
    grid = crop_grid(resized(squared(size), 728), 728, 504)
    assert views == "n".join("c" * grid.columns for _ in range(grid.rows)) + "g"


def test_thin_strips_become_squares_and_huge_pictures_shrink():
    assert squared((200, 20)) == (200, 200)
    assert squared((200, 40)) == (200, 40)
    assert resized((6048, 3024), 728) == (3024, 1512)


def test_crops_are_cut_row_by_row():
    grid = crop_grid((1008, 504), 728, 504)
    assert grid.boxes() == [(0, 0, 504, 504), (504, 0, 1008, 504)]
