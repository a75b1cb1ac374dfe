"""Reward `count`: compares the number, or the points, in the answer with the ground truth."""

# ruff: noqa: RUF001  # the patterns contain punctuation and words of several scripts

import math
import re
import unicodedata
from typing import Annotated

import numpy as np
from pydantic import Field

from rewards import Invalid, Rollout, Score, reward
from rewards.answer import bold, find
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
from rewards.numbers import words
from rewards.text import wide_folded

_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.,^/\u2212~〜–至到-])", r"(?![A-Za-z0-9_^/]|[-.,]\d|\s?[~〜–至到]\s?\d)"
# Finds numbers, but skips numbers inside a power, fraction, name, range or longer number: "9^9", "3/4", "B2", "5-7".
_FIGURES = re.compile(rf"{_BEFORE}\d{{1,15}}+(?:,\d{{3}})*+(?:\.\d{{0,15}}+)?{_AFTER}")
_HEDGE = re.compile(
    r"\d\s{1,3}(?:or|to|oder|bis|ou|o)\s{1,3}(?:maybe\s|perhaps\s)?\d|\d\s?或\s?\d|\bbetween\s\d{1,9}\sand\s\d"
)
_BRACKETS = re.compile(r"\([^()]{0,400}\)|\[[^\[\]]{0,400}\]")
# What follows these words is a part of what was counted before them.
_DETAILS = re.compile(
    r"\b(?:of which|of them|among (?:which|them)|including|consisting of|made up of|namely|davon|darunter|dont"
    r"|de los cuales)\b|其中|包括|分别|そのうち|그중",
    re.IGNORECASE,
)
_TOTAL_BEFORE = re.compile(
    r"(?:\btotal\b|\bsum\b|\baltogether\b|\bin all\b|\binsgesamt\b|一共|总共|共计|合计|总计|合計|全部で|共有|共|총)"
    r"[^\d.;\n]{0,30}$",
    re.IGNORECASE,
)
_TOTAL_AFTER = re.compile(
    r"[^\d.;:\n]{0,40}(?:\bin total\b|\baltogether\b|\bin all\b|\binsgesamt\b|\bau total\b|\ben total\b)", re.IGNORECASE
)
_LISTED = re.compile(r"[ ]?[^\W\d_][^\d:：.\n]{0,60}[:：][^\n]{0,400}\d")
_SENTENCE = re.compile(r"[!?。！？\n]|\.(?=\s|$)")
_NOTHING = re.compile(
    r"\b(?:none|nothing|nobody|no one|not any|(?:are|is)n['’]t any)\b|没有|沒有|无|無|ありません|いません"
    r"|없(?:습니다|어요|음|다)|\bkeine?\b|\baucune?\b|\bningun[ao]?\b|\bningún\b"
    r"|\bno\b(?! (?:idea|way|doubt|answer|information|clue|one knows|clear|matter|number))(?= [a-z])",
    re.IGNORECASE,
)


@reward("count", on_timeout="lowest", verifiable=True)
class Count:
    """1.0 for the true number, else 0.0. If the ground truth is a list of points, the points in the answer are scored.

    If the ground truth is a number, the marked part of the answer counts (see rewards/answer.py), else the last text in
    bold that has a number, else the whole answer if it is short. The number that answers is the number after the last
    "=", or the number at a word such as "in total", or the last number of the last sentence with a number. Numbers of a
    breakdown do not count: numbers in brackets, after "including" and similar words, and after "7 dogs:". Digits ("12")
    go before words ("twelve", "十二"). "None" and "there are no dogs" are 0. "5 or 6" and "5-7" are no number.
    Coordinates of points and boxes are skipped.

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
        found = find(wide_folded(rollout.answer))
        if found is None:
            return Score(0.0, {"why": "a long answer without a mark such as \\boxed{...} or Answer:"})
        text = found.text
        emphasised = None if found.mark else _number(bold(text) or "")
        number = _number(text) if emphasised is None else emphasised
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
    """Returns the number that the text states as the result of counting, or None."""
    text = unicodedata.normalize("NFKC", EITHER.sub(" ", text))
    if _HEDGE.search(text):
        return None
    outside = _BRACKETS.sub(" ", text)
    text = outside if _numbers(outside) else text
    if (equation := text.rpartition("="))[1] and (after := _numbers(equation[2])):
        return after[0][2]
    every = _numbers(text)
    if not every:
        return 0.0 if _NOTHING.search(text) else None
    totals = [value for start, end, value in every if _is_total(text, start, end)]
    if totals:
        return totals[-1]
    for sentence in reversed(_SENTENCE.split(text)):
        if numbers := _numbers(_DETAILS.split(sentence)[0]) or _numbers(sentence):
            headed = [value for _, end, value in numbers if _LISTED.match(sentence, end)]
            return headed[0] if headed else numbers[-1][2]
    return every[-1][2]


def _is_total(text: str, start: int, end: int) -> bool:
    """True if a word such as "in total" belongs to the number between `start` and `end`."""
    return bool(_TOTAL_BEFORE.search(text, max(0, start - 40), start) or _TOTAL_AFTER.match(text, end))


def _numbers(text: str) -> list[tuple[int, int, float]]:
    """Returns start, end and value of each number in digits; if there is none, of each number in words."""
    if figures := list(_FIGURES.finditer(text)):
        return [(one.start(), one.end(), float(one[0].replace(",", ""))) for one in figures]
    return [(start, end, float(value)) for start, end, value in words(text)]


def _true_number(rollout: Rollout) -> float:
    given, row = rollout.prompt.ground_truth, rollout.prompt.id
    if isinstance(given, str) and (found := find(given)) and found.mark:
        given = found.text  # for example "<answer> 10 </answer>"
    try:
        number = float(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 1e15 or number != int(number):
        raise Invalid(f"count needs a whole number or a list of points as ground truth; row {row} has {given!r}")
    return number
