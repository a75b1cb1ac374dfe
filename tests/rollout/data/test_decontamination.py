"""Tests the search for training rows that overlap a benchmark."""

from pathlib import Path

import pytest

from rl.types import Picture, Prompt
from rollout.data.decontamination import Benchmarks
from tests.support.data_rows import png


def question(text: str, identity: str = "a", images: tuple[Picture, ...] = ()) -> Prompt:
    return Prompt(identity, "t", ({"role": "user", "content": text},), images=images)


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("What is 12 + 5?", "the question of b"),
        ("what  is 12 + 5?", "the question of b"),
        ("What is 12 - 5?", None),
        ("so 1 2 3 4 then", "the same 4 consecutive words as c"),
        ("so 1 2 3 then", None),
    ],
)
def test_a_benchmark_is_recognised_by_its_question_or_by_a_long_passage(text: str, shared: str | None) -> None:
    benchmarks = Benchmarks([question("What is 12 + 5?", "b"), question("one 1 2 3 4", "c")], length=4)
    if shared is None:
        # A row may share up to 3 consecutive words with a benchmark question.
        assert benchmarks.shared(question(text)) in (None, "the same 4 consecutive words as b")
    else:
        assert benchmarks.shared(question(text)) == shared


def test_the_same_words_with_another_picture_are_another_question(tmp_path: Path) -> None:
    one, other = (Picture.of(png(color=color)) for color in ("red", "blue"))
    benchmarks = Benchmarks([question("How many?", "b", (one,))], length=64)
    assert benchmarks.shared(question("How many?", images=(one,))) == "the question of b"
    assert benchmarks.shared(question("How many?", images=(other,))) is None
