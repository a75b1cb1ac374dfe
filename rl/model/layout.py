"""Computes how STEP3-VL pads, scales and crops a picture. This file works on sizes only, not on pixels.

The rules and thresholds are taken from the published serving code: the choice of the window size, the rounding of a
side to whole windows, and the limit of 3,024 pixels. The published code gives the thresholds only for 728-pixel views.
In this file, the thresholds scale with the size of the view. This scaling is a reconstruction.
"""

from dataclasses import dataclass
from math import ceil

PUBLISHED_GLOBAL, PUBLISHED_LIMIT = 728, 3024
Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class CropGrid:
    """A grid of square windows over a picture that is resized to `size`. `window` is the side of a window in pixels.
    If it is 0, there are no windows."""

    size: Size
    window: int

    @property
    def columns(self) -> int:
        return max(1, ceil(self.size[0] / self.window)) if self.window else 0

    @property
    def rows(self) -> int:
        return max(1, ceil(self.size[1] / self.window)) if self.window else 0

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Returns (left, top, right, bottom) of each window, row by row. The last window of a row or column is moved
        back so that it ends at the edge of the picture."""
        return [
            (x, y, x + self.window, y + self.window)
            for y in self._starts(self.size[1], self.rows)
            for x in self._starts(self.size[0], self.columns)
        ]

    def _starts(self, length: int, count: int) -> list[int]:
        starts = [self.window * i for i in range(count)]
        if count > 1:
            starts[-1] = min(starts[-1], length - self.window)
        return starts


def squared(size: Size) -> Size:
    """Returns the size after padding. A picture is padded to a square if its short side is under 32 pixels and its long
    side is more than 4 times as long as the short side. Other pictures are not padded."""
    width, height = size
    thin = min(width, height) < 32 and max(width, height) > 4 * min(width, height)
    return (max(size), max(size)) if thin else size


def resized(size: Size, global_size: int) -> Size:
    """Returns the size after scaling. If the long side is over the limit (3,024 for 728-pixel views), the picture is
    scaled down to the limit."""
    limit = round(PUBLISHED_LIMIT * global_size / PUBLISHED_GLOBAL)
    if max(size) <= limit:
        return size
    scale = limit / max(size)
    return int(size[0] * scale), int(size[1] * scale)


def crop_grid(size: Size, global_size: int, crop_size: int) -> CropGrid:
    """Returns the grid of crops of a picture. A small picture that is nearly square has no crops.

    Public implementations differ for a picture whose long side has exactly `global_size` (728) pixels. This function
    follows vLLM 0.28, where such a picture is not small: 728 x 728 pixels have four crops and 504 tokens. In the code
    of early vLLM, SGLang and transformers 5.23, the picture has no crops and 171 tokens. Rollouts come from vLLM here,
    so learner and engine must follow its rule.
    """
    long, short = max(size), min(size)
    if long < global_size:
        window = short if long / short > 1.5 else 0
    else:
        window = min(short, crop_size) if long / short > 4 else crop_size
    if not window:
        return CropGrid(size, 0)
    return CropGrid((_rounded(size[0], window), _rounded(size[1], window)), window)


def _rounded(length: int, window: int) -> int:
    """Rounds `length` to a multiple of `window`: up if the remainder is more than a fifth of a window, otherwise
    down."""
    if length < window:
        return length
    windows = length // window
    return window * (windows + 1 if length / window - windows > 0.2 else windows)


def picture_tokens(size: Size, global_size: int, crop_size: int, global_tokens: int, crop_tokens: int) -> int:
    """Returns the number of prompt tokens of a picture.

    A start token and an end token enclose the tokens of each crop, and also the tokens of the global view. A newline
    token follows each row of crops except the last row.
    """
    grid = crop_grid(resized(squared(size), global_size), global_size, crop_size)
    return grid.count * (crop_tokens + 2) + global_tokens + 2 + max(0, grid.rows - 1)


def picture_words(size: Size, global_size: int, crop_size: int, global_tokens: int, crop_tokens: int) -> list[str]:
    """Returns the words in the tokenizer that stand for a picture in a prompt, `picture_tokens` in number: first the
    crops, row by row, then the global view. Their order is taken from the published serving code."""
    grid = crop_grid(resized(squared(size), global_size), global_size, crop_size)
    crop = ["<patch_start>", *["<im_patch>"] * crop_tokens, "<patch_end>"]
    words = list[str]()
    for row in range(grid.rows):
        words += crop * grid.columns + (["<patch_newline>"] if row < grid.rows - 1 else [])
    return [*words, "<im_start>", *["<im_patch>"] * global_tokens, "<im_end>"]
