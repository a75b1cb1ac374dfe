"""Tests the reward `point_distance`: points are read and compared with a true point or a true box."""

from typing import Any

import pytest

from rewards import Invalid, get
from tests.support.reward_samples import (
    HOSTILE,
    HOSTILE_SHAPES,
    assert_lowest_soon,
    assert_truth_scores_highest,
    picture,
    rollout,
    score,
)


def test_the_value_is_one_at_the_target_and_falls_to_exactly_zero_at_the_radius() -> None:
    values = [score("point_distance", f"[{x}, 0.5]", [0.5, 0.5]) for x in (0.5, 0.51, 0.6, 0.69, 0.7, 0.9)]
    assert values[0] == 1.0
    assert values[2] == pytest.approx(0.5)  # 1 - distance 0.1 / radius 0.2
    assert values == sorted(values, reverse=True)
    assert values[3] > 0.0
    assert score("point_distance", "[1, 0.5]", [0.5, 0.5], radius=0.5) == 0.0
    assert values[5] == 0.0


@pytest.mark.parametrize(
    "text",
    ["(0.5, 0.25)", '{"point_2d": [0.5, 0.25]}', "<point>0.5 0.25</point>", "<point>(.5, .25)</point>"],
)
def test_a_point_is_read_in_all_usual_notations_and_the_last_one_counts(text: str) -> None:
    assert score("point_distance", f"(0.9, 0.9), or rather {text}", [0.5, 0.25]) == 1.0


@pytest.mark.parametrize("text", ["", "0.5 0.5", "[0.5, 0.5, 0.5]", "[nan, 0.5]", "[0.5, 1e999]"])
def test_text_without_a_usable_point_scores_zero(text: str) -> None:
    assert score("point_distance", text, [0.5, 0.5]) == 0.0


def test_pixel_distances_are_fractions_of_width_and_of_height() -> None:
    # The picture is 100 pixels wide and 50 pixels high. So 10 pixels to the right are a distance of 0.1, and 10 pixels
    # down are a distance of 0.2.
    bound = get("point_distance", {"coordinates": "pixel", "radius": 0.4})
    right, down = (rollout(text, [50, 25], (picture(100, 50),)) for text in ("[60, 25]", "[50, 35]"))
    assert (bound(right).value, bound(down).value) == (pytest.approx(0.75), pytest.approx(0.5))


@pytest.mark.parametrize(("point", "value"), [("(0.5, 0.3)", 1.0), ("(0.4, 0.2)", 1.0), ("(0.5, 0.41)", 0.0)])
def test_a_point_scores_one_inside_a_true_box_or_on_its_edge_and_else_zero(point: str, value: float) -> None:
    assert score("point_distance", point, [0.4, 0.2, 0.6, 0.4]) == value


def test_a_list_of_points_scores_its_best_value_divided_by_their_number() -> None:
    # The radius is 0.2. The first point is 0.1 away and scores 0.5. The second point is too far away and scores 0.
    assert score("point_distance", "[[0.5, 0.6], [0, 0]]", [0.5, 0.5]) == pytest.approx(0.5 / 2)
    assert score("point_distance", "[[0.5, 0.3], [0, 0], [1, 1]]", [0.4, 0.2, 0.6, 0.4]) == pytest.approx(1 / 3)


def test_a_list_of_true_points_is_refused_and_count_is_named_instead() -> None:
    with pytest.raises(Invalid, match=r"row-1 .*use the reward count"):
        score("point_distance", "[0.5, 0.5]", [[0.5, 0.5], [0.1, 0.1]])


@pytest.mark.parametrize("truth", [[0.123456789, 1 / 3], [0.1, 0.2, 0.3, 0.4]])
def test_a_response_that_states_the_ground_truth_scores_highest(truth: Any) -> None:
    assert_truth_scores_highest("point_distance", truth)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_megabytes_of_hostile_text_score_zero_within_two_seconds(text: str) -> None:
    assert_lowest_soon("point_distance", [0.5, 0.5], text)


@pytest.mark.parametrize("truth", [[0.1, 0.1], [0.1, 0.1, 0.2, 0.2]])
@pytest.mark.parametrize("text", HOSTILE_SHAPES.values(), ids=HOSTILE_SHAPES.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(truth: Any, text: str) -> None:
    assert_lowest_soon("point_distance", truth, text)
