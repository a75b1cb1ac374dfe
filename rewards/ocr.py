"""Reward `ocr`: how close an answer's transcription is to the true text, by edit distance."""

import re
from typing import Any

from rapidfuzz.distance import Levenshtein

from rewards import Invalid, Rollout, Score, reward
from rewards.registry import as_response
from rewards.text import folded, marked_answer

LONGEST_TRUTH = 20_000
"""Maximum number of characters of a true text. The time of a comparison grows with the product of the lengths of both
texts."""
LONGEST_TIMES, LONGEST_PLUS = 4, 64
"""An answer with more characters than 4 * (characters of the true text) + 64 is not compared, because it could not earn
much more than 1/4."""

_FENCE = re.compile(r"```\w{0,20}+\n(.*)\n```", re.DOTALL)


def _first(truth: Any) -> str:
    return as_response(truth[0] if isinstance(truth, list | tuple) and truth else truth)


@reward("ocr", on_timeout="lowest", verifiable=_first)
def ocr(rollout: Rollout, case_sensitive: bool = True) -> Score:
    """1 - (edit distance) / (length of the longer text), after normalising white space and Unicode forms.

    The transcription is the answer's last `\\boxed{...}` if there is one, else the text after the last "Answer:", else
    the whole answer. A code fence around the transcription is removed. If the true text itself contains `\\boxed{...}`
    or "Answer:", the whole answer is the transcription. The ground truth is one text or a list of acceptable texts. If
    there are several texts, the text that is nearest to the transcription counts.

    The STEP3-VL report describes no reward for reading text. Perception-R1, which the report cites, uses edit distance.
    The normalisation here is a reconstruction.
    """
    best = 0.0
    for true in _true_texts(rollout):
        wanted, limit = _comparable(true, case_sensitive), LONGEST_TIMES * len(true) + LONGEST_PLUS
        text = _transcription(rollout.answer, true, limit)
        if len(text) <= limit and len(given := _comparable(text, case_sensitive)) <= limit:
            best = max(best, Levenshtein.normalized_similarity(given, wanted))
    return Score(best) if best else Score(0.0, {"why": "the answer is not similar to the true text, or is much longer"})


def _true_texts(rollout: Rollout) -> list[str]:
    truth, row = rollout.prompt.ground_truth, rollout.prompt.id
    texts = list(truth) if isinstance(truth, list | tuple) else [truth]
    for text in texts:
        if not isinstance(text, str | int | float) or not folded(str(text)):
            raise Invalid(f"ocr needs text or a list of texts as ground truth; row {row} has {truth!r}"[:500])
        if len(str(text)) > LONGEST_TRUTH:
            raise Invalid(f"the true text of row {row} has {len(str(text))} characters; the limit is {LONGEST_TRUTH}")
    if not texts:
        raise Invalid(f"ocr needs text or a list of texts as ground truth; row {row} has an empty list")
    return [str(text) for text in texts]


def _transcription(answer: str, true: str, limit: int) -> str:
    """Returns the part of the answer that is compared; "" if no part is marked and the answer is longer than
    `limit`."""
    marks_itself = marked_answer(true, len(true)) != true.strip()
    text = answer if marks_itself else marked_answer(answer, limit) or ""
    fenced = _FENCE.fullmatch(text) if len(text) <= limit else None
    return fenced[1] if fenced else text


def _comparable(text: str, case_sensitive: bool) -> str:
    return folded(text) if case_sensitive else folded(text).casefold()
