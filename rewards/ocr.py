"""Reward `ocr`: how close an answer's transcription is to the true text, by edit distance."""

import re
from collections.abc import Iterator
from typing import Any

from rapidfuzz.distance import Levenshtein

from rewards import Invalid, Rollout, Score, reward
from rewards.answer import bare, bold, find, last_line, outermost
from rewards.registry import as_response
from rewards.text import folded, plain_number, unescaped

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

    The transcription is the marked part of the answer (see rewards/answer.py). If nothing is marked, it is the whole
    answer, the last text in bold or the last line, whichever is nearest to the true text. If the true text itself
    contains a mark, the whole answer is the transcription. A code fence, markdown and LaTeX around the transcription
    are removed, and also the backslash before signs such as %. The ground truth is one text or a list of acceptable
    texts. If there are several texts, the text that is nearest to the transcription counts.

    The STEP3-VL report describes no reward for reading text. Perception-R1, which the report cites, uses edit distance.
    The normalisation here is a reconstruction.
    """
    best = 0.0
    for true in _true_texts(rollout):
        wanted, limit = _comparable(true, case_sensitive), LONGEST_TIMES * len(true) + LONGEST_PLUS
        for text in _transcriptions(rollout.answer, true, limit):
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
    return [plain_number(text) if isinstance(text, float) else str(text) for text in texts]


def _transcriptions(answer: str, true: str, limit: int) -> Iterator[str]:
    """Yields the parts of the answer that are compared. Yields none if nothing is marked and the answer is longer than
    `limit`, except a short part at its end."""
    own, marked = find(true, len(true)), find(answer, limit)
    if marked and marked.mark and not (own and own.mark):
        yield _unfenced(marked.text, limit)
        return
    yield _unfenced(answer, limit)
    if outer := outermost(answer, limit):  # the true text contains a mark, and the answer has one around it
        yield _unfenced(outer, limit)
    tail = answer[-limit:]
    yield from (part for part in (bold(tail), last_line(tail)) if part and len(part) < len(tail.strip()))


def _unfenced(text: str, limit: int) -> str:
    fenced = _FENCE.fullmatch(text.strip()) if len(text) <= limit else None
    return fenced[1] if fenced else text


def _comparable(text: str, case_sensitive: bool) -> str:
    text = unescaped(bare(folded(text)))
    return text if case_sensitive else text.casefold()
