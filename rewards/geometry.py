"""Boxes and points in answers and in data rows: what the perception rewards share."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rewards import Invalid, Rollout
from rewards.text import last_boxed, marked_answer

Coordinates = Literal["unit", "thousand", "pixel"]
"""unit: fractions of the picture, 0 to 1; thousand: 0 to 1000; pixel: of the data row's picture."""

Shape = tuple[float, ...]
"""(x1, y1, x2, y2) or (x, y)."""

MOST = 500
"""Boxes or points of one answer or one row; matching n with n takes n^3 steps."""
LONGEST = 1 << 16
"""Characters of an answer, counted from its end, that are searched for boxes and points."""

# Possessive quantifiers and bounded blanks: no text makes these patterns step back over what they have read.
_NUMBER = r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++|nan|inf(?:inity)?)(?:e[-+]?\d{1,6}+)?)"
_BLANK = r"\s{0,16}+"
_NEXT = rf"{_BLANK}[\])]?{_BLANK},?{_BLANK}[\[(]?{_BLANK}(?<![\d.])"
_OPEN, _CLOSE = rf"[\[(>]{_BLANK}", rf"{_BLANK}[\])<]"
_BOX = _OPEN + _NEXT.join([_NUMBER] * 4) + _CLOSE
_POINT = _OPEN + _NUMBER + rf"{_BLANK},?{_BLANK}(?<![\d.])" + _NUMBER + _CLOSE


def _named(*keys: str) -> str:
    """Numbers behind their names: `"x": 1, "y": 2` (JSON), `x="1" y="2"` (a tag), `x=1, y=2` (a call)."""
    pairs = [rf"{key}[\"']?{_BLANK}[:=]{_BLANK}[\"']?{_NUMBER}[\"']?" for key in keys]
    return r"(?<![a-z_])" + rf"{_BLANK},?{_BLANK}[\"']?".join(pairs)


_NAMED_BOX = _named("x_?(?:1|min)", "y_?(?:1|min)", "x_?(?:2|max)", "y_?(?:2|max)")
_NAMED_POINT = _named(r"x\d{0,3}+", r"y\d{0,3}+")

BOXES = re.compile(f"{_BOX}|{_NAMED_BOX}", re.IGNORECASE)
POINTS = re.compile(f"{_POINT}|{_NAMED_POINT}", re.IGNORECASE)
EITHER = re.compile(f"{_BOX}|{_NAMED_BOX}|{_POINT}|{_NAMED_POINT}", re.IGNORECASE)

# What may stand between two members of one list: punctuation, numbers, "and", quoted keys and labels, tags.
_GLUE = re.compile(
    r"(?:[\s,;:.\d\[\](){}]|and\b|\"[^\"\n]*+\"|'[^'\n]*+'|\w{1,20}+="
    r"|\A/\w{1,20}+>|<\w{1,20}+\s?\Z|[\"']\Z"  # the rest of a tag or of a key that is part of the shape itself
    r"|<[^<>\n]{1,100}+>|>[^<>\n]{0,100}+</\w{1,20}+>|/?>)*+"
)
_GAP = 300  # characters; a label is shorter


def counted(answer: str) -> str | None:
    """The part of an answer whose boxes and points count: its last `\\boxed{...}`, which then may do without
    brackets of its own; else what follows its last "Answer:"; else all of it. None if it marks nothing and is
    longer than LONGEST."""
    boxed = last_boxed(answer[-LONGEST:])
    return marked_answer(answer, LONGEST) if boxed is None else f"[{boxed}]"


def shapes(pattern: re.Pattern[str], answer: str, last_list: bool = False) -> list[Shape]:
    """All shapes of the part of the answer that counts, as they stand, in order; those past MOST are left out
    but one, so that there are visibly too many.

    Understood are `[x1, y1, x2, y2]` and `[x, y]` (alone, in lists, as values in JSON), the same in round
    brackets, `(x1, y1), (x2, y2)`, numbers between tags such as `<box>` and `<point>`, and numbers with names.

    `last_list`: only the shapes listed together with the last one. Those before it, with other words than
    labels in between, are earlier thoughts and count neither for nor against the answer.
    """
    text = counted(answer) or ""
    found: list[Shape] = []
    end = 0
    for match in pattern.finditer(text):
        if last_list and not _listed_together(text[end : match.start()]):
            found.clear()
        end = match.end()
        if len(found) <= MOST:
            found.append(tuple(float(number) for number in match.groups() if number))
    return found


def _listed_together(gap: str) -> bool:
    return len(gap) <= _GAP and _GLUE.fullmatch(gap) is not None


def readable(found: Sequence[Shape], size: tuple[float, float]) -> tuple[list[Shape], str]:
    """Those of a model's shapes that can be used, in fractions of the picture, and why the first other can't."""
    if len(found) > MOST:
        return [], f"more than {MOST} boxes or points"
    shapes_read = [read(numbers, size) for numbers in found]
    reasons = [shape for shape in shapes_read if isinstance(shape, str)]
    return [shape for shape in shapes_read if not isinstance(shape, str)], reasons[0] if reasons else ""


def read(numbers: Shape, size: tuple[float, float]) -> Shape | str:
    """A model's numbers in fractions of the picture, or why they can't be used."""
    if not all(map(math.isfinite, numbers)):
        return "a coordinate is not finite"
    fractions = as_fractions(numbers, size)
    if not all(-1 <= c <= 2 for c in fractions):
        return "a coordinate is more than a picture's size outside the picture"
    if len(fractions) == 4 and not _is_box(fractions):
        return "not a box: x1 < x2 and y1 < y2 is needed"
    return fractions


def shown(found: Sequence[Shape]) -> list[list[str]]:
    """The first few shapes of an answer for a score's details, as text because JSON has no infinity."""
    return [[repr(number) for number in numbers] for numbers in found[:20]]


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


def true_shape(rollout: Rollout, value: Any, coordinates: Coordinates, lengths: Sequence[int], want: str) -> Shape:
    """A box or point of the row's ground truth, a list of as many numbers as `lengths` allows (4 a box, 2 a
    point), in fractions of the picture.

    Raises Invalid if it is anything else or does not fit `coordinates`; `want` says what the reward takes.
    """
    row = rollout.prompt.id
    if not is_shape(value) or len(value) not in lengths:
        raise Invalid(f"the ground truth of row {row} has {value!r} where this reward takes {want}")
    fractions = as_fractions(tuple(value), units(rollout, coordinates))
    if not all(0 <= c <= 1 for c in fractions):
        raise Invalid(
            f"the ground truth of row {row}, {value!r}, lies outside its picture if coordinates are "
            f"'{coordinates}'; set the reward's parameter coordinates to unit, thousand or pixel"
        )
    if len(fractions) == 4 and not _is_box(fractions):
        raise Invalid(f"the ground truth of row {row}, {value!r}, is no box: x1 < x2 and y1 < y2")
    return fractions


def true_shapes(rollout: Rollout, coordinates: Coordinates, length: int, want: str) -> list[Shape]:
    """The row's ground truth, one shape or a list of them, in fractions of the picture; raises as `true_shape`."""
    value, row = rollout.prompt.ground_truth, rollout.prompt.id
    several = isinstance(value, list | tuple) and bool(value) and all(isinstance(v, list | tuple) for v in value)
    values = list(value) if several else [value]
    if len(values) > MOST:
        raise Invalid(f"the ground truth of row {row} has {len(values)} boxes or points; the most is {MOST}")
    return [true_shape(rollout, one, coordinates, [length], want) for one in values]


def as_fractions(numbers: Shape, size: tuple[float, float]) -> Shape:
    return tuple(number / size[i % 2] for i, number in enumerate(numbers))


def matched(scores: np.ndarray) -> np.ndarray:
    """The scores, falling, of those pairs (row, column), each row and column in one pair at most, whose sum is
    the largest: the assignment that the Hungarian method finds."""
    from scipy.optimize import linear_sum_assignment  # here: takes half a second and much address space

    return np.sort(scores[linear_sum_assignment(scores, maximize=True)])[::-1]


def is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) in (2, 4) and all(map(_finite, value))


def centre(shape: Shape) -> Shape:
    """A box's middle; a point itself."""
    return shape if len(shape) == 2 else ((shape[0] + shape[2]) / 2, (shape[1] + shape[3]) / 2)


def inside(point: Shape, box: Shape) -> bool:
    """Edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def box_iou(a: Shape, b: Shape) -> float:
    """Intersection over union, 0 to 1, of two boxes (x1, y1, x2, y2) with x1 < x2 and y1 < y2, same units."""
    return float(box_ious([a], [b])[0, 0])


def box_ious(a: Sequence[Shape], b: Sequence[Shape]) -> np.ndarray:
    """[A, B] IoU of every box of `a` with every one of `b`."""
    left, right = np.asarray(a)[:, None], np.asarray(b)[None]  # [A, 1, 4] and [1, B, 4]
    sides = np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2])
    common = np.clip(sides, 0, None).prod(-1)
    areas = (left[..., 2:] - left[..., :2]).prod(-1) + (right[..., 2:] - right[..., :2]).prod(-1)
    # areas too small for a float count as no overlap
    return np.clip(common / np.maximum(areas - common, np.finfo(float).tiny), 0, 1)


def _is_box(box: Shape) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
