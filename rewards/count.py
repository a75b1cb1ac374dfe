"""Reward `count`: compares the number, or the points, in the answer with the ground truth."""

import math
import re
from typing import Annotated

import numpy as np
from pydantic import Field

from rewards import Invalid, Rollout, Score, reward
from rewards.geometry import (
    EITHER,
    POINTS,
    Coordinates,
    best_pairs,
    for_details,
    picture_size,
    shapes,
    true_shapes,
    usable,
)
from rewards.text import marked_answer, normalised

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SMALL += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)} | {"none": 0}
# Finds numbers, but skips numbers inside a power, fraction, name or longer number: "9^9", "3/4", "B2", "1.2.3".
_FIGURES = re.compile(r"(?<![\w.,^/\u2212-])\d{1,15}+(?:,\d{3})*+(?:\.\d{0,15}+)?(?![\w^/]|[-.,]\d)")
_SPELLED = re.compile(rf"\b(?:({'|'.join(_TENS)})[- ])?({'|'.join(_WORDS)})\b")


@reward("count", on_timeout="lowest", verifiable=True)
class Count:
    """1.0 for the true number, else 0.0. If the ground truth is a list of points, the points in the answer are scored.

    If the ground truth is a number, the last number in digits ("12") in the answer counts. If the answer has no number
    in digits, the last number in words ("twelve") counts. Only one part of the answer is searched: the last
    `\\boxed{...}`, else the text after the last "Answer:", else the whole answer if it is short. Coordinates of points
    and boxes are skipped.

    If the ground truth is a list of points, the answer must give the points, as in Perception-R1. The given
    points are matched one to one with the true points, so that the sum of max(0, 1 - d / radius) over all pairs is as
    large as possible. d is the Euclidean distance between the two points of a pair. d and `radius` are measured in
    picture widths (along x) and picture heights (along y). The value is the sum divided by max(number of given points,
    number of true points). A missing point costs as much as a superfluous point. An answer that only states a number
    earns 0.0, because a number alone does not show where the things are.

    The STEP3-VL report describes no reward for counting. The formula and the radius are reconstructions.
    """

    def __init__(self, radius: Annotated[float, Field(gt=0)] = 0.1, coordinates: Coordinates = "unit") -> None:
        self.radius = radius
        self.coordinates: Coordinates = coordinates

    def setup(self) -> None:
        best_pairs(np.ones((1, 1)))  # imports scipy now, so that the import does not count against a sample's limits

    def __call__(self, rollout: Rollout) -> Score:
        if isinstance(rollout.prompt.ground_truth, list | tuple):
            return self._points(rollout)
        true = _true_number(rollout)
        text = marked_answer(rollout.answer)
        if text is None:
            return Score(0.0, {"why": 'a long answer without \\boxed{...} and without "Answer:"'})
        number = _number(text)
        if number is None:
            return Score(0.0, {"why": "no number in the answer", "answer": text[:200]})
        return Score(float(number == true), {"number": number})

    def _points(self, rollout: Rollout) -> Score:
        true = true_shapes(
            rollout, self.coordinates, 2, "a number, or a list of points [x, y] (0 if there is no point)"
        )
        found = shapes(POINTS, rollout.answer)
        if not found:
            return Score(0.0, {"why": "no point in the answer"})
        points, why = usable(found, picture_size(rollout, self.coordinates))
        if not points:
            return Score(0.0, {"why": why, "points": for_details(found)})
        apart = np.linalg.norm(np.asarray(points)[:, None] - np.asarray(true)[None], axis=-1)  # [given, true]
        value = float(best_pairs(np.clip(1 - apart / self.radius, 0, None)).sum()) / max(len(found), len(true))
        return Score(value, {"given": len(found), "true": len(true), "points": for_details(found)})


def _number(text: str) -> float | None:
    text = normalised(EITHER.sub(" ", text))
    if figures := _FIGURES.findall(text):
        return float(figures[-1].replace(",", ""))
    if words := _SPELLED.findall(text):
        tens, rest = words[-1]
        return float(_WORDS.get(tens, 0) + _WORDS[rest])
    return None


def _true_number(rollout: Rollout) -> float:
    given, row = rollout.prompt.ground_truth, rollout.prompt.id
    try:
        number = float(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 1e15 or number != int(number):
        raise Invalid(f"count needs a whole number or a list of points as ground truth; row {row} has {given!r}")
    return number
