"""Tests the reward `exact`: equal text after normalisation."""

from typing import Any

import pytest

from rewards import Invalid
from tests.support.reward_samples import HOSTILE, assert_lowest_soon, score


@pytest.mark.parametrize("text", ["Paris", "paris.", "so it is.\nAnswer: Paris", r"\boxed{\text{Paris}}!"])
def test_the_box_counts_else_the_text_after_answer_else_all_of_it(text: str) -> None:
    assert score("exact", text, "Paris") == 1.0


@pytest.mark.parametrize("text", ["It is Paris", "Answer: Paris or Rome", r"Paris \boxed{Rome}", ""])
def test_an_answer_that_only_contains_the_truth_scores_zero(text: str) -> None:
    assert score("exact", text, "Paris") == 0.0


def test_many_blanks_do_not_hide_a_wrong_answer_before_the_truth() -> None:
    assert score("exact", "Rome" + " " * 10_000 + "Paris", "Paris") == 0.0


def test_numbers_are_compared_as_text() -> None:
    assert score("exact", "Answer: 7", 7) == 1.0


@pytest.mark.parametrize("truth", [None, "", " . ", ["a"]])
def test_a_malformed_ground_truth_makes_the_row_invalid(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("exact", "x", truth)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_megabytes_of_hostile_text_score_zero_within_two_seconds(text: str) -> None:
    assert_lowest_soon("exact", "5", text)
