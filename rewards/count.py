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
from rewards.numbers import ENGLISH, HAN, words
from rewards.text import wide_folded

_BEFORE = r"(?<![A-Za-z0-9_.,^/\u2212-])(?<!\d[~〜–至到])(?<!\d\s[~〜–至到])(?<!\d[~〜–至到]\s)"
_AFTER = r"(?![A-Za-z0-9_^/]|[-.,]\d|-[A-Za-z]|\s?[~〜–至到]\s?\d|\s?[%％])"
# Finds numbers, but skips numbers inside a power, fraction, name, range or longer number: "9^9", "3/4", "B2", "5-7".
_FIGURES = re.compile(rf"{_BEFORE}\d{{1,15}}+(?:,\d{{3}})*+(?:\.\d{{0,15}}+)?{_AFTER}")
_ANY = rf"(?:\d{{1,9}}|{ENGLISH.pattern}|{HAN.pattern})"
# Finds "5 or 6", "two to three" and "5, perhaps 6", which are no certain number.
_HEDGE = re.compile(
    rf"{_ANY}\s?\w?\s?(?:\(?\b(?:or|to|oder|bis|ou)\b|到|至|或者?|か|또는)\s?(?:maybe\s|perhaps\s|possibly\s)?{_ANY}"
    rf"|{_ANY}(?: or so)?\W{{1,3}}(?:or\s)?(?:possibly|perhaps|maybe)\s{_ANY}|\bbetween\s{_ANY}\sand\s{_ANY}"
    r"|^\W*\d{1,9}(?:\s?,\s\d{1,9}){1,9}\W*$",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"\([^()]{0,400}\)|\[[^\[\]]{0,400}\]")
# What follows these words in a sentence is a part of what was counted before them.
_DETAILS = re.compile(
    r"\b(?:of which|of them|among (?:which|them)|including|consisting of|made up of|namely|i\.e\.|davon|darunter|dont"
    r"|de los cuales)\b|其中|包括|分别|そのうち|그중",
    re.IGNORECASE,
)
# Words directly after a number that is only a part: "3 of them"; words directly before a number that is not meant.
_PART = re.compile(r"\s{1,3}of (?:them|which|these|those|the) ", re.IGNORECASE)
_PART_IF_FIRST = re.compile(r"\s{1,3}(?:is|are|was|were) ", re.IGNORECASE)
_NOT_THIS = re.compile(r"(?:\bnot|\brather than|\binstead of|\bout of|\bnicht|而不是|不是)\s{0,3}$", re.IGNORECASE)
_PLACE = re.compile(
    r"\b(?:on|over|within|in|behind|under|near|by|at|beside)\s(?:the\s|a\s|figure\s|image\s|picture\s)?$", re.IGNORECASE
)
_TOTAL_BEFORE = re.compile(
    r"(?:\btotal\b|\bsum\b|\baltogether\b|\bin all\b|\binsgesamt\b|一共|总共|共计|合计|总计|合計|全部で|共有|共|총)"
    r"[^\d.,;:：\n-]{0,30}[:：=]?\s?$",
    re.IGNORECASE,
)
_TOTAL_AFTER = re.compile(
    r"(?: total\b|[^\d.,;:\n]{0,40}(?:\bin total\b|\baltogether\b|\bin all\b|\binsgesamt\b|\bau total\b|\ben total\b))",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"\b(?:so|thus|therefore|hence|making|makes|total|together|in all)\b|因此|所以|一共|共", re.IGNORECASE
)
MOST_PARTS = 30  # maximum number of numbers in an answer that are looked at as parts of a sum
_NOT_ONE = re.compile(r"\bnot a single\b|\bnot one\b|没有一\w|一\w(?:也|都)没有", re.IGNORECASE)
_SENTENCE = re.compile(r"[!?;。！？；\n]|\.(?=\s|$)")
_NOTHING = re.compile(
    r"\b(?:none|nothing|nobody|no one|not any|(?:are|is)n['’]t an?y?|(?:do|can)(?:n['’]t| not) see any)\b"
    r"|没有|沒有|(?<!\w)[无無](?!法|论|關|关|数|人)|ありません|いません"
    r"|없(?:습니다|어요|음|다)|\bkeine?\b|\baucune?\b|\bningun[ao]?\b|\bningún\b|\bpas de\b"
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
        number = _number(text, marked=found.mark is not None)
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


def _number(text: str, marked: bool) -> float | None:
    """Returns the number that the text states as the result of counting, or None. `marked` is True for the marked part
    of an answer, which states the result first."""
    text = re.sub(r"(?<!not )\ba single\b", "one", unicodedata.normalize("NFKC", EITHER.sub(" ", text)))
    if _HEDGE.search(text):
        return None
    if _NOT_ONE.search(text):
        return 0.0
    outside = _BRACKETS.sub(" ", text)
    text = outside if _numbers(outside) else text
    every = _numbers(text)
    if not every:
        return 0.0 if _NOTHING.search(text) else None
    first_sentence = text[: _sentence(text, every[0][0])[1]]
    if marked and not _CONCLUDES.search(first_sentence) and "=" not in text:
        stated = _numbers(first_sentence)
        if len(stated) == 1 or not text[: stated[0][0]].strip("*_$ "):
            return stated[0][2]
    for rule in (_after_equals, _total, _sum_of_parts):
        if (found := rule(text)) is not None:
            return found
    start, _, value = ([one for one in every if not _is_part(text, *one[:2])] or every)[-1]
    emphasised = None if marked else bold(text[slice(*_sentence(text, start))])
    numbers = _numbers(emphasised or "")
    return numbers[0][2] if numbers else value


def _after_equals(text: str) -> float | None:
    """Returns 7 for "3 + 4 = 7" and for "7 = 3 + 4"."""
    before, equals, after = text.rpartition("=")
    left, right = _numbers(before.rpartition("\n")[2]), _numbers(after.partition("\n")[0])
    if not equals or not right:
        return None
    parts = [value for _, _, value in right]
    return left[-1][2] if left and len(parts) > 1 and left[-1][2] == sum(parts) else parts[0]


def _total(text: str) -> float | None:
    """Returns the number at a word such as "in total"."""
    every = _numbers(text)
    before = [value for start, _, value in every if _TOTAL_BEFORE.search(text, max(0, start - 40), start)]
    after = [value for _, end, value in every if _TOTAL_AFTER.match(text, end)]
    return (after or before or [None])[-1]


def _sum_of_parts(text: str) -> float | None:
    """Returns 7 for "seven dogs, 3 brown and 4 white": a number that is the sum of two or more numbers after it."""
    values = [value for _, _, value in sorted({*_figures(text), *words(text)})][:MOST_PARTS]
    for place, value in enumerate(values):
        for last in range(place + 3, len(values) + 1):
            if value and value == sum(values[place + 1 : last]):
                return float(value)
    return None


def _is_part(text: str, start: int, end: int) -> bool:
    """True if the number between `start` and `end` is not the result, as in "3 of them are brown", "not 6" and
    "on 2 sofas"."""
    begins = _sentence(text, start)[0]
    if _DETAILS.search(text, begins, start) or _PART.match(text, end) or _NOT_THIS.search(text, begins, start):
        return True
    is_first = not _numbers(text[begins:start])
    return bool(_PART_IF_FIRST.match(text, end) if is_first else _PLACE.search(text, begins, start))


def _sentence(text: str, place: int) -> tuple[int, int]:
    """Returns start and end of the sentence, or of the line, around a place."""
    start = max((one.end() for one in _SENTENCE.finditer(text, 0, place)), default=0)
    following = _SENTENCE.search(text, place)
    return start, following.start() if following else len(text)


def _numbers(text: str) -> list[tuple[int, int, float]]:
    """Returns start, end and value of each number in digits; if there is none, of each number in words."""
    return _figures(text) or [(start, end, float(value)) for start, end, value in words(text)]


def _figures(text: str) -> list[tuple[int, int, float]]:
    return [(one.start(), one.end(), float(one[0].replace(",", ""))) for one in _FIGURES.finditer(text)]


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
