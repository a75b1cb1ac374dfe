"""Boxes and points in answers and in data rows: what the perception rewards share."""

import math
import re
from typing import Any, Literal

from rewards import Invalid, Rollout
from rewards.text import WINDOW

Coordinates = Literal["unit", "thousand", "pixel"]
"""unit: fractions of the picture, 0 to 1; thousand: 0 to 1000; pixel: of the data row's picture."""

# Possessive quantifiers and bounded blanks: no text makes these patterns step back over what they have read.
_NUMBER = r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++|nan|inf(?:inity)?)(?:e[-+]?\d{1,6}+)?)"
_BLANK = r"\s{0,16}+"
_NEXT = rf"{_BLANK}[\])]?{_BLANK},?{_BLANK}[\[(]?{_BLANK}(?<![\d.])"
_OPEN, _CLOSE = rf"[\[(>]{_BLANK}", rf"{_BLANK}[\])<]"
_BOX = re.compile(_OPEN + _NEXT.join([_NUMBER] * 4) + _CLOSE, re.IGNORECASE)
_POINT = re.compile(_OPEN + _NUMBER + rf"{_BLANK},?{_BLANK}(?<![\d.])" + _NUMBER + _CLOSE, re.IGNORECASE)


def last_box(answer: str) -> tuple[float, ...] | None:
    """The last four numbers written as a box, as they stand: `[x1, y1, x2, y2]` (also in JSON),
    `(x1, y1, x2, y2)`, `(x1, y1), (x2, y2)`, `<box>x1 y1 x2 y2</box>`. None if there is none."""
    return _last(_BOX, answer)


def last_point(answer: str) -> tuple[float, ...] | None:
    """The last two numbers written as a point, as they stand: `[x, y]` (also in JSON), `(x, y)`,
    `<point>x y</point>`. None if there is none."""
    return _last(_POINT, answer)


def _last(pattern: re.Pattern[str], answer: str) -> tuple[float, ...] | None:
    found = None
    for found in pattern.finditer(answer[-WINDOW:]):  # noqa: B007
        pass
    return tuple(float(number) for number in found.groups()) if found else None


def units(rollout: Rollout, coordinates: Coordinates) -> tuple[float, float]:
    """What one picture width and one picture height are in these coordinates.

    Raises Invalid for pixels if the row has no picture.
    """
    if coordinates != "pixel":
        side = 1.0 if coordinates == "unit" else 1000.0
        return side, side
    if not rollout.prompt.images:
        raise Invalid(f"coordinates: pixel needs a picture, and row {rollout.prompt.id} has none")
    width, height = rollout.prompt.images[0].size
    return float(width), float(height)


def truth(rollout: Rollout, coordinates: Coordinates, count: int) -> tuple[float, ...]:
    """The row's ground truth, `count` numbers (4 a box, 2 a point), in fractions of the picture.

    Raises Invalid if it is anything else or does not fit `coordinates`.
    """
    numbers, row = rollout.prompt.ground_truth, rollout.prompt.id
    want = "[x1, y1, x2, y2]" if count == 4 else "[x, y]"
    if _several(numbers):
        raise Invalid(f"row {row} has {len(numbers)} boxes or points; this reward takes one, {want}")
    if not isinstance(numbers, list | tuple) or len(numbers) != count or not all(map(_finite, numbers)):
        raise Invalid(f"the ground truth of row {row} is {numbers!r}; this reward takes {want}")
    fractions = as_fractions(tuple(numbers), units(rollout, coordinates))
    if not all(0 <= c <= 1 for c in fractions):
        raise Invalid(
            f"the ground truth of row {row}, {numbers!r}, lies outside its picture if coordinates are "
            f"'{coordinates}'; set the reward's parameter coordinates to unit, thousand or pixel"
        )
    if count == 4 and not _is_box(fractions):
        raise Invalid(f"the ground truth of row {row}, {numbers!r}, is no box: x1 < x2 and y1 < y2")
    return fractions


def read(numbers: tuple[float, ...], size: tuple[float, float]) -> tuple[float, ...] | str:
    """A model's numbers in fractions of the picture, or why they can't be used."""
    if not all(map(math.isfinite, numbers)):
        return "a coordinate is not finite"
    fractions = as_fractions(numbers, size)
    if not all(-1 <= c <= 2 for c in fractions):
        return "a coordinate is more than a picture's size outside the picture"
    if len(fractions) == 4 and not _is_box(fractions):
        return "not a box: x1 < x2 and y1 < y2 is needed"
    return fractions


def as_fractions(numbers: tuple[float, ...], size: tuple[float, float]) -> tuple[float, ...]:
    return tuple(number / size[i % 2] for i, number in enumerate(numbers))


def _is_box(box: tuple[float, ...]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(v, list | tuple | dict) for v in value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
