"""Reads boxes and points from answers and data rows. The perception rewards use this module."""

# ruff: noqa: RUF001, RUF003  # punctuation and words of several scripts

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from rewards import Invalid, Rollout
from rewards.answer import find
from rewards.text import wide_folded

Coordinates = Literal["unit", "percent", "thousand", "pixel", "shown"]
"""unit: fractions of the picture's width and height, 0 to 1. percent, thousand: the same fractions times 100 or 1000.
pixel: pixels of the data row's picture. shown: pixels of this picture after the model's own padding and scaling."""
_SIDES = {"unit": 1.0, "percent": 100.0, "thousand": 1000.0}

Shape = tuple[float, ...]
"""A box (x1, y1, x2, y2) or a point (x, y)."""

MOST = 500
"""Maximum number of boxes or points in one answer or row. Matching n boxes with n boxes takes n^3 steps."""
LONGEST = 1 << 16
"""Only this many characters at the end of an answer are searched for boxes and points."""

# Quantifiers are possessive and white space is bounded, so that no text makes these patterns backtrack.
_NUMBER = r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++|nan|inf(?:inity)?)(?:e[-+]?\d{1,6}+)?)(?:\s?\\?%)?"
_BLANK = r"\s{0,16}+"
_NEXT = rf"{_BLANK}[\])]?{_BLANK},?{_BLANK}[\[(]?{_BLANK}(?<![\d.])"
_OPEN, _CLOSE = rf"[\[(>]{_BLANK}", rf"{_BLANK}[\])<]"
_BOX = _OPEN + _NEXT.join([_NUMBER] * 4) + _CLOSE
_POINT = _OPEN + _NUMBER + rf"{_BLANK},?{_BLANK}(?<![\d.])" + _NUMBER + _CLOSE


def _named(*keys: str) -> str:
    """Returns a pattern for numbers that follow names: `"x": 1, "y": 2` (JSON), `x="1" y="2"` (a tag), `x=1, y=2` (a
    call)."""
    pairs = [rf"{key}[\"']?{_BLANK}[:=]{_BLANK}[\"']?{_NUMBER}[\"']?" for key in keys]
    return r"(?<![a-z_])" + rf"{_BLANK},?{_BLANK}[\"']?".join(pairs)


def _keyed(key: str, count: int) -> str:
    """Returns a pattern for numbers without brackets after a name, such as `point:512,300`."""
    between = rf"(?:{_BLANK},|\s){_BLANK}(?<![\d.])"
    return rf"(?<![a-z_]){key}[\"']?{_BLANK}[:=]{_BLANK}[\"']?" + between.join([_NUMBER] * count)


_NAMED_BOX = _named("x_?(?:1|min)", "y_?(?:1|min)", "x_?(?:2|max)", "y_?(?:2|max)")
_NAMED_POINT = _named(r"x(?:\d{0,3}+|坐标)", r"y(?:\d{0,3}+|坐标)")
_KEYED_BOX = _keyed(r"(?:b?box(?:_2d)?|coordinates?|坐标|位置)", 4)
_KEYED_POINT = (
    _keyed(r"(?:start_|end_)?(?:point|coordinates?|position|坐标|位置)\d{0,2}", 2) + rf"(?!\d|\.\d|{_BLANK},{_BLANK}\d)"
)
# two corners with words between them: "from (1, 2) to (3, 4)", "左上角（1，2），右下角（3，4）"
_CORNERS = (
    rf"{_POINT}{_BLANK}(?:,|;|to|and|和|至|到)?{_BLANK}(?:and|to)?{_BLANK}"
    rf"(?:右下角?|(?:the\s)?bottom[- ]right(?:\scorner)?)?"
    rf"{_BLANK}(?:at|:)?{_BLANK}{_POINT}"
)

BOXES = re.compile(f"{_BOX}|{_CORNERS}|{_NAMED_BOX}|{_KEYED_BOX}", re.IGNORECASE)
POINTS = re.compile(f"{_POINT}|{_NAMED_POINT}|{_KEYED_POINT}", re.IGNORECASE)
EITHER = re.compile(
    f"{_BOX}|{_CORNERS}|{_NAMED_BOX}|{_KEYED_BOX}|{_POINT}|{_NAMED_POINT}|{_KEYED_POINT}", re.IGNORECASE
)

# The text allowed between two shapes of one list: punctuation, numbers, "and", quoted keys and labels, tags. The match
# of a shape may contain the "<" of a tag "</box>". Then the text between the shapes begins with the rest, "/box>".
_GLUE = re.compile(
    r"(?:[\s,;:.\d\[\](){}]|and\b|\"[^\"\n]*+\"|'[^'\n]*+'|\w{1,20}+="
    r"|\A/\w{1,20}+>|<\w{1,20}+\s?\Z|[\"']\Z"  # part of a tag or key: "/box>", "<box" or a quotation mark
    r"|<[^<>\n]{1,100}+>|>[^<>\n]{0,100}+</\w{1,20}+>|/?>)*+"
)
_BRACKETS = str.maketrans("【】〔〕〈〉、", "[][][],")
_BARE_NUMBERS = re.compile(r"[\s\d.,%+-]{3,200}")  # a whole answer such as "100, 200, 300, 400"
_GAP = 300  # maximum number of characters between two shapes of one list


def answer_part(answer: str) -> str | None:
    """Returns the part of an answer whose boxes and points count: the marked part (see rewards/answer.py), else the
    whole answer. Full-width digits and signs become ASCII. The content of `\\boxed{...}`, and a marked text or a
    list with commas that has only numbers, is put in brackets. Returns None if the answer is longer than LONGEST and
    has no mark."""
    found = find(wide_folded(answer[-LONGEST - 1 :]), LONGEST)
    if found is None:
        return None
    text = found.text.translate(_BRACKETS).replace("\\left", "").replace("\\right", "")
    only_numbers = _BARE_NUMBERS.fullmatch(text) is not None and (found.mark is not None or "," in text)
    return f"[{text}]" if found.mark == "box" or only_numbers else text


def shapes(pattern: re.Pattern[str], answer: str, last_list: bool = False) -> list[Shape]:
    """Returns all shapes that `pattern` finds in the `answer_part` of an answer, in order. Their numbers are not
    converted to fractions. If there are more than MOST shapes, returns the first MOST + 1.

    Finds `[x1, y1, x2, y2]` and `[x, y]` (alone, in lists, as values in JSON), the same shapes in round brackets, two
    corners such as `(x1, y1), (x2, y2)`, numbers between tags such as `<box>` and `<point>`, named numbers (see
    `_named`), and numbers after a name, such as `point:512,300`.

    If `last_list` is True, returns only the last shape and the other shapes in the same list. A list ends at the first
    word that is not a label. Shapes before the last list are ignored, because they are earlier attempts.
    """
    text = answer_part(answer) or ""
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


def usable(found: Sequence[Shape], size: tuple[float, float]) -> tuple[list[Shape], str]:
    """Returns the usable shapes of an answer as fractions of the picture. Also returns why the first unusable shape
    cannot be used, or "" if all shapes are usable."""
    if len(found) > MOST:
        return [], f"more than {MOST} boxes or points"
    checked = [usable_shape(numbers, size) for numbers in found]
    reasons = [shape for shape in checked if isinstance(shape, str)]
    return [shape for shape in checked if not isinstance(shape, str)], reasons[0] if reasons else ""


def usable_shape(numbers: Shape, size: tuple[float, float]) -> Shape | str:
    """Returns a shape of an answer as fractions of the picture, or the reason why it cannot be used."""
    if not all(map(math.isfinite, numbers)):
        return "a coordinate is not finite"
    fractions = as_fractions(numbers, size)
    if not all(-1 <= c <= 2 for c in fractions):
        return "a coordinate lies outside the picture by more than the picture's size"
    if len(fractions) == 4 and not _is_box(fractions):
        return "not a box: x1 < x2 and y1 < y2 are needed"
    return fractions


def for_details(found: Sequence[Shape]) -> list[list[str]]:
    """Returns the first 20 shapes for the details of a Score. Numbers are converted to text, because JSON has no
    infinity."""
    return [[repr(number) for number in numbers] for numbers in found[:20]]


def picture_size(rollout: Rollout, coordinates: Coordinates) -> tuple[float, float]:
    """Returns the picture's width and height in the given coordinates.

    Raises Invalid if the coordinates are pixels and the row has no picture, or the model is not known.
    """
    if coordinates in _SIDES:
        return _SIDES[coordinates], _SIDES[coordinates]
    if not rollout.prompt.images:
        raise Invalid(f"coordinates '{coordinates}' need a picture, but row {rollout.prompt.id} has none")
    picture = rollout.prompt.images[0]
    size = picture.size if coordinates == "pixel" else picture.shown
    if size is None:
        raise Invalid("coordinates 'shown' need the folder of the model; `rewards try` takes it from --model FOLDER")
    return float(size[0]), float(size[1])


def true_shape(rollout: Rollout, value: Any, coordinates: Coordinates, lengths: Sequence[int], want: str) -> Shape:
    """Returns a box or point of the row's ground truth as fractions of the picture. `lengths` lists the allowed
    numbers of coordinates: 4 for a box, 2 for a point.

    Raises Invalid if `value` is not such a box or point, or if it does not fit `coordinates`. The error
    message contains `want`, a description of the values that the reward takes, such as "[x1, y1, x2, y2]".
    """
    row = rollout.prompt.id
    if not is_shape(value) or len(value) not in lengths:
        raise Invalid(f"the ground truth of row {row} contains {value!r}; this reward takes {want}")
    fractions = as_fractions(tuple(value), picture_size(rollout, coordinates))
    if not all(0 <= c <= 1 for c in fractions):
        raise Invalid(
            f"the ground truth of row {row}, {value!r}, lies outside its picture if coordinates are "
            f"'{coordinates}'; set the reward's parameter coordinates to {', '.join(get_args(Coordinates))}"
        )
    if len(fractions) == 4 and not _is_box(fractions):
        raise Invalid(f"the ground truth of row {row}, {value!r}, is no box: x1 < x2 and y1 < y2 are needed")
    return fractions


def true_shapes(rollout: Rollout, coordinates: Coordinates, length: int, want: str) -> list[Shape]:
    """Returns the shapes of the row's ground truth (one shape or a list) as fractions of the picture.

    Raises Invalid if `true_shape` raises Invalid for one of the shapes, or if there are more than MOST shapes.
    """
    value, row = rollout.prompt.ground_truth, rollout.prompt.id
    several = isinstance(value, list | tuple) and bool(value) and all(isinstance(v, list | tuple) for v in value)
    values = list(value) if several else [value]
    if len(values) > MOST:
        raise Invalid(f"the ground truth of row {row} has {len(values)} boxes or points; at most {MOST} are allowed")
    return [true_shape(rollout, one, coordinates, [length], want) for one in values]


def as_fractions(numbers: Shape, size: tuple[float, float]) -> Shape:
    return tuple(number / size[i % 2] for i, number in enumerate(numbers))


def best_pairs(scores: np.ndarray) -> np.ndarray:
    """Matches the rows of a matrix with its columns one to one, so that the sum of the matched scores is the largest
    (Hungarian method).

    Returns the scores of the matched pairs, in descending order.
    """
    from scipy.optimize import linear_sum_assignment  # this import takes half a second and much address space

    return np.sort(scores[linear_sum_assignment(scores, maximize=True)])[::-1]


def is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) in (2, 4) and all(map(_finite, value))


def centre(shape: Shape) -> Shape:
    """Returns the middle of a box. A point is returned unchanged."""
    return shape if len(shape) == 2 else ((shape[0] + shape[2]) / 2, (shape[1] + shape[3]) / 2)


def inside(point: Shape, box: Shape) -> bool:
    """True if the point is in the box or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def box_iou(a: Shape, b: Shape) -> float:
    """Returns the intersection over union (0 to 1) of two boxes in the same units, with x1 < x2 and y1 < y2."""
    return float(box_ious([a], [b])[0, 0])


def box_ious(a: Sequence[Shape], b: Sequence[Shape]) -> np.ndarray:
    """Returns [A, B]: the IoU of every box in `a` with every box in `b`."""
    left, right = np.asarray(a)[:, None], np.asarray(b)[None]  # [A, 1, 4] and [1, B, 4]
    sides = np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2])
    common = np.clip(sides, 0, None).prod(-1)
    areas = (left[..., 2:] - left[..., :2]).prod(-1) + (right[..., 2:] - right[..., :2]).prod(-1)
    # if the union is too small for a float, the IoU is 0
    return np.clip(common / np.maximum(areas - common, np.finfo(float).tiny), 0, 1)


def _is_box(box: Shape) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
