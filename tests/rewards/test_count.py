"""Tests the reward `count`: numbers in digits or in words, and lists of points."""

import json
from typing import Any

import pytest

from rewards import Invalid, get
from rewards.geometry import MOST
from tests.support.reward_samples import (
    HOSTILE_SHAPES,
    assert_lowest_soon,
    assert_truth_scores_highest,
    rollout,
    score,
)


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "3.",
        "3.0",
        "three",
        "Three (3).",
        "**3**",
        "$3$",
        r"\boxed{3}",
        r"\boxed{\text{three}}",
        "There are 3 apples",
        "There are three apples.",
        "2 red and 1 green: 2 + 1 = 3",
        "10 or so.\nAnswer: 3",
        "3 apples: (0.1, 0.2), (0.3, 0.4), (0.5, 0.6)",
        "\u0663",
    ],
)
def test_a_count_is_the_last_number_of_the_answer(text: str) -> None:
    assert score("count", text, 3) == score("count", text, "3") == 1.0
    assert score("count", text, 4) == 0.0


@pytest.mark.parametrize("text", ["", "many", "-3", "9^9^9^3", "3/4", "1.2.3", "1,2,3", "B3", "3rd", "[0.1, 3]"])
def test_a_digit_that_is_part_of_something_else_is_no_count(text: str) -> None:
    assert score("count", text, 3) == 0.0


@pytest.mark.parametrize(("text", "number"), [("twenty-one", 21), ("1,250", 1250), ("none", 0), ("forty", 40)])
def test_larger_numbers_in_words_and_none_are_read(text: str, number: int) -> None:
    assert score("count", text, number) == 1.0


def test_points_score_by_distance_divided_by_the_larger_count() -> None:
    truth = [[0.2, 0.2], [0.8, 0.8]]
    # The radius is 0.1. One point is exact and scores 1, the other point is 0.05 away and scores 0.5. The sum 1.5 is
    # divided by the larger number of points: by 2 for the first answer, and by 3 for the second answer.
    assert score("count", "[[0.8, 0.85], [0.2, 0.2]]", truth) == pytest.approx(0.75)
    assert score("count", "[[0.8, 0.85], [0.2, 0.2], [0.5, 0.5]]", truth) == pytest.approx(0.5)
    assert score("count", "[[0.2, 0.2]]", truth) == 0.5


def test_a_number_without_points_scores_zero_if_the_truth_is_a_list_of_points() -> None:
    found = get("count")(rollout("There are 2.", [[0.2, 0.2], [0.8, 0.8]]))
    assert (found.value, found.details) == (0.0, {"why": "no point in the answer"})


@pytest.mark.parametrize("truth", [None, True, "many", 2.5, -1, "nan", "inf", "", {"n": 3}, [], [[0.5, 0.5], [2, 0]]])
def test_a_ground_truth_that_is_no_count_makes_the_row_invalid(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("count", "3", truth)


def test_more_than_the_allowed_number_of_points_score_zero_with_the_reason() -> None:
    truth = [[0.5, 0.5], [0.1, 0.1]]
    too_many = get("count")(rollout(json.dumps([[0.5, 0.5]] * (MOST + 1)), truth))
    assert (too_many.value, too_many.details["why"]) == (0.0, f"more than {MOST} boxes or points")
    assert get("count")(rollout(json.dumps([[0.5, 0.5]] * MOST), truth)).value > 0.0


@pytest.mark.parametrize("truth", [7, "7", [[0.1, 0.2], [1 / 3, 0.4]]])
def test_a_response_that_states_the_ground_truth_scores_highest(truth: Any) -> None:
    assert_truth_scores_highest("count", truth)


@pytest.mark.parametrize("truth", [5, [[0.1, 0.1], [0.2, 0.2]]])
@pytest.mark.parametrize("text", HOSTILE_SHAPES.values(), ids=HOSTILE_SHAPES.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(truth: Any, text: str) -> None:
    assert_lowest_soon("count", truth, text)
