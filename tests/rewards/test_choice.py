"""Tests the reward `choice`: letters and texts of options."""

from typing import Any

import pytest

from rewards import Invalid, get
from rl.types import Prompt, Rollout
from tests.support.reward_samples import HOSTILE_TEXTS, assert_lowest_soon, assert_truth_scores_highest

OPTIONS = ["Rome", "Paris", "A cat", "C major"]


def chosen(text: str, truth: Any, options: Any = None) -> float:
    meta = {} if options is None else {"options": options}
    return float(get("choice")(Rollout(Prompt("row-1", "t", (), ground_truth=truth, meta=meta), text)).value)


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "(b)",
        "B.",
        "**B**",
        "B) Paris",
        "B. Paris",
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        "Answer: (B)",
        "**Answer:** **B**",
        "The answer is B",
        "The answer is B because A is too small.",
        "The correct option is (B).",
        "I think it's B.",
        "It is not clear, but option B is right",
        "A is too small.\nAnswer: B",
    ],
)
def test_a_letter_is_read_in_all_usual_notations(text: str) -> None:
    assert chosen(text, "B") == chosen(text, "(b)") == chosen(text, "Paris", OPTIONS) == 1.0
    assert chosen(text, "A") == chosen(text, "Rome", OPTIONS) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "A, B",
        r"\boxed{A, B}",
        r"\boxed{A and B}",
        "The answer is A or B",
        "option A or option B",
        "A/B",
        "(A) (B) (C) (D)",
        "A. B. C. D.",
        "Answer: A B C D",
        "AB",
        "none of them",
        "",
    ],
)
def test_an_answer_with_several_letters_or_none_is_wrong(text: str) -> None:
    assert [chosen(text, letter, OPTIONS) for letter in "ABCD"] == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("paris.", "B"),
        ("The answer is Paris", "B"),
        ("A cat", "C"),
        ("C. A cat", "C"),
        ("C major", "D"),
        ("D. C major", "D"),
    ],
)
def test_the_text_of_an_option_counts_as_its_letter(text: str, letter: str) -> None:
    by_letter = dict(zip("ABCD", OPTIONS, strict=True))
    assert chosen(text, letter, OPTIONS) == chosen(text, letter, by_letter) == 1.0
    assert chosen(text, "A", OPTIONS) == 0.0


def test_the_words_a_and_i_are_no_letters() -> None:
    assert chosen("A big house", "A") == chosen("I see", "I") == chosen("a", "B") == 0.0


@pytest.mark.parametrize(
    ("truth", "options"),
    [(None, None), ("K", OPTIONS), ("Paris", None), ("E", OPTIONS), ("London", OPTIONS), (1, OPTIONS), ("A", "AB")],
)
def test_a_malformed_ground_truth_or_options_make_the_row_invalid(truth: Any, options: Any) -> None:
    with pytest.raises(Invalid, match=r"row-1"):
        chosen("A", truth, options)


def test_a_response_that_states_the_text_of_the_true_option_scores_highest() -> None:
    assert [chosen(option, option, OPTIONS) for option in OPTIONS] == [1.0] * 4


@pytest.mark.parametrize("truth", ["B", "(c)"])
def test_a_response_that_states_the_ground_truth_scores_highest(truth: Any) -> None:
    assert_truth_scores_highest("choice", truth)


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(text: str) -> None:
    assert_lowest_soon("choice", "J", text)
