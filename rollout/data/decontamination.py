"""Finds training rows that overlap a benchmark: rows with the same question, or with the same long sequence of
words."""

import re
from collections.abc import Iterable, Iterator, Sequence

from rl.types import Prompt

_WORD = re.compile(r"\w+|[^\w\s]")  # signs count as words, so that 12 + 5 differs from 12 - 5


class Benchmarks:
    """The questions of the benchmarks, and all sequences of `length` consecutive words in them.

    Args:
        rows: the rows of the benchmarks.
        length: the number of words in a sequence. A training row overlaps a benchmark if they share a sequence. Whole
            questions are also compared, so a shorter question can overlap too. The STEP3-VL-10B report says 64-grams,
            but does not give their units. The units of this class (words and signs, in lower case) are our choice.
    """

    def __init__(self, rows: Iterable[Prompt], length: int) -> None:
        self.length, self.rows = length, 0
        self._questions: dict[tuple[str, ...], list[tuple[frozenset[str], str]]] = {}
        self._runs: dict[tuple[str, ...], str] = {}
        for row in rows:
            self.rows += 1
            words = words_of(row)
            self._questions.setdefault(words, []).append((_pictures(row), row.id))
            for run in _runs(words, length):
                self._runs.setdefault(run, row.id)

    def shared(self, row: Prompt) -> str | None:
        """Returns a text that says how a row overlaps a benchmark row, or None if there is no overlap.

        A question with the same words but other pictures is a different question. For example, "How many are there?"
        fits many pictures.
        """
        words = words_of(row)
        for pictures, identity in self._questions.get(words, ()):
            if pictures == _pictures(row):
                return f"the question of {identity}"
        for run in _runs(words, self.length):
            if run in self._runs:
                return f"the same {self.length} consecutive words as {self._runs[run]}"
        return None


def words_of(row: Prompt) -> tuple[str, ...]:
    """Returns all words and signs of a row's messages, in lower case."""
    texts = []
    for message in row.messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return tuple(_WORD.findall(" ".join(texts).lower()))


def _pictures(row: Prompt) -> frozenset[str]:
    return frozenset(picture.digest for picture in row.images)


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))
