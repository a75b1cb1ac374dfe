"""Tests the reward `ocr`: the edit distance of a transcription."""

import time
from typing import Any

import pytest

from rewards import Invalid
from rewards.ocr import LONGEST_TRUTH
from tests.support.reward_samples import HOSTILE_TEXTS, assert_lowest_soon, assert_truth_scores_highest, score


def test_the_value_is_one_minus_edits_over_the_longer_length() -> None:
    assert score("ocr", "kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert score("ocr", "ab", "abcd") == 0.5
    assert score("ocr", "abcd", "ab") == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "Platform 9,  exit B",
        "Platform 9,\nexit B",
        "It says:\nAnswer: Platform 9, exit B",
        r"\boxed{Platform 9, exit B}",
        "```text\nPlatform 9, exit B\n```",
        "\u200ePlatform\u00a09, exit \uff22",
    ],
)
def test_white_space_unicode_forms_and_marks_around_the_text_are_ignored(text: str) -> None:
    assert score("ocr", text, "Platform 9, exit B") == 1.0


def test_case_counts_unless_case_sensitive_is_false() -> None:
    assert score("ocr", "stop", "STOP") == 0.0
    assert score("ocr", "stop", "STOP", case_sensitive=False) == 1.0


def test_the_whole_answer_is_compared_if_the_true_text_contains_a_mark() -> None:
    assert score("ocr", "Question: 6 x 7? Answer: 42", "Question: 6 x 7? Answer: 42") == 1.0


def test_the_nearest_of_several_acceptable_texts_counts() -> None:
    assert score("ocr", "colour", ["color", "colour"]) == 1.0


def test_a_page_is_compared_within_two_seconds_and_a_far_longer_answer_scores_zero() -> None:
    page = "the quick brown fox. " * (LONGEST_TRUTH // 21)
    start = time.process_time()
    assert score("ocr", page[::-1] * 3, page) < 0.5
    assert score("ocr", page * 5, page) == 0.0
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("truth", [None, "", "  ", [], ["a", ""], {"text": "a"}, "a" * (LONGEST_TRUTH + 1)])
def test_a_malformed_true_text_makes_the_row_invalid(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("ocr", "a", truth)


@pytest.mark.parametrize("truth", ["Gleis 9 3/4", ["color", "colour"], 42])
def test_a_response_that_states_the_ground_truth_scores_highest(truth: Any) -> None:
    assert_truth_scores_highest("ocr", truth)


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(text: str) -> None:
    assert_lowest_soon("ocr", "\u0141\u017b", text)
