"""Tests the reward `iou`: boxes are read, matched with the true boxes and scored."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards import Invalid, get
from rewards.geometry import MOST
from tests.support.reward_samples import (
    HOSTILE,
    HOSTILE_SHAPES,
    assert_lowest_soon,
    assert_truth_scores_highest,
    picture,
    rollout,
    score,
)

TRUE_BOX = [0.0, 0.0, 0.5, 1.0]
LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
TOP = [0, 0, 1, 0.5]


def test_iou_is_squared_by_default() -> None:
    # The true box is one half of the answer's box, so the IoU is 1/2.
    assert score("iou", "[0, 0, 1, 1]", TRUE_BOX) == 0.25
    assert score("iou", "[0, 0, 1, 1]", TRUE_BOX, power=1) == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "[0, 0, 0.5, 1]",
        "The box is (0.0, 0.0, .5, 1.).",
        '```json\n{"bbox_2d": [0, 0, 0.5, 1], "label": "cat"}\n```',
        '[{"box": [0, 0, 5e-1, 1]}]',
        "<box>0 0 0.5 1</box>",
        "<box>[0, 0, 0.5, 1]</box>",
        "<|box_start|>(0, 0), (0.5, 1)<|box_end|>",
        "[[0, 0, 0.5, 1]]",
        "first [0.1, 0.1, 0.2, 0.2], no, [0, 0, 0.5, 1]",
    ],
)
def test_a_box_is_read_in_all_usual_notations_and_the_last_one_counts(text: str) -> None:
    assert score("iou", text, TRUE_BOX) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left half",
        "[0, 0, 0.5]",
        "[0, 0, 0.5, 1, 1]",
        "[0.5, 1, 0, 0]",
        "[0, 0, nan, 1]",
        "[0, 0, inf, 1]",
        "[0, 0, 1e308, 1e308]",
        "[0, 0, 0.5, 1] or [nan, 0, 0.5, 1]",
        "<think>[0, 0, 0.5, 1]",
    ],
)
def test_text_without_a_usable_box_scores_zero(text: str) -> None:
    assert score("iou", text, TRUE_BOX) == 0.0


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ([[0, 0, 1, 1], [0, 0, 0.5]], "takes \\[x1, y1, x2, y2\\]"),
        ([0, 0, 500, 1000], "set the reward's parameter coordinates"),
        ([0.5, 0, 0.5, 1], "is no box"),
        ([0, 0, float("nan"), 1], "takes \\[x1, y1, x2, y2\\]"),
        ([0, 0, 1], "takes \\[x1, y1, x2, y2\\]"),
        ("[0, 0, 1, 1]", "takes \\[x1, y1, x2, y2\\]"),
        (None, "takes \\[x1, y1, x2, y2\\]"),
    ],
)
def test_a_malformed_true_box_makes_the_row_invalid(truth: Any, said: str) -> None:
    with pytest.raises(Invalid, match=said):
        score("iou", "[0, 0, 1, 1]", truth)


def test_coordinates_may_be_thousandths_or_pixels() -> None:
    assert score("iou", "[0, 0, 1000, 1000]", [0, 0, 500, 1000], coordinates="thousand", power=1) == 0.5
    row = rollout("[0, 0, 40, 30]", [0, 0, 20, 30], (picture(40, 30),))
    assert get("iou", {"coordinates": "pixel", "power": 1})(row).value == 0.5
    with pytest.raises(Invalid, match="outside its picture"):
        get("iou", {"coordinates": "pixel"})(rollout("", [0, 0, 41, 30], (picture(40, 30),)))
    with pytest.raises(Invalid, match="row row-1 has none"):
        score("iou", "[0, 0, 1, 1]", [0, 0, 1, 1], coordinates="pixel")


def test_coordinates_may_be_pixels_of_the_picture_as_the_model_is_shown_it() -> None:
    seen = replace(picture(40, 30), shown=(20, 60))
    row = rollout("[0, 0, 10, 60]", [0, 0, 20, 60], (seen,))
    assert get("iou", {"coordinates": "shown", "power": 1})(row).value == 0.5
    with pytest.raises(Invalid, match="outside its picture if coordinates are 'shown'"):
        get("iou", {"coordinates": "shown"})(rollout("", [0, 0, 21, 60], (seen,)))
    with pytest.raises(Invalid, match=r"need the folder of the model; .* --model FOLDER"):
        get("iou", {"coordinates": "shown"})(rollout("", [0, 0, 1, 1], (picture(40, 30),)))


def test_several_boxes_score_the_sum_of_iou_powers_over_the_larger_count() -> None:
    # The IoU of LEFT with LEFT is 1. TOP and RIGHT overlap on 1/4 of the picture and together cover 3/4 of the picture,
    # so their IoU is 1/3.
    answer = json.dumps([TOP, LEFT])
    assert score("iou", answer, [LEFT, RIGHT], power=1) == pytest.approx((1 + 1 / 3) / 2)
    assert score("iou", answer, [LEFT, RIGHT], power=2) == pytest.approx((1 + 1 / 9) / 2)
    assert score("iou", answer, [LEFT, RIGHT, [0, 0, 0.1, 0.1]], power=1) < score("iou", answer, [LEFT, RIGHT], power=1)


def test_a_missing_and_a_superfluous_box_cost_the_same() -> None:
    assert score("iou", json.dumps([LEFT]), [LEFT, RIGHT]) == 0.5
    assert score("iou", json.dumps([LEFT, RIGHT]), [LEFT]) == 0.5


def test_the_same_box_twice_matches_one_true_box_only() -> None:
    assert score("iou", json.dumps([LEFT, LEFT]), [LEFT, RIGHT]) == 0.5


def test_a_corrected_box_counts_but_a_listed_guess_costs() -> None:
    assert score("iou", "At first sight [0.5, 0, 1, 1], but no: [0, 0, 0.5, 1]", LEFT) == 1.0
    assert score("iou", "[0.5, 0, 1, 1], [0, 0, 0.5, 1]", LEFT) == 0.5


def test_many_guessed_boxes_score_less_than_one_in_the_middle() -> None:
    grid = [[x / 10, y / 10, x / 10 + 0.5, y / 10 + 0.5] for x in range(6) for y in range(6)]
    truth = [0.13, 0.32, 0.61, 0.86]
    assert score("iou", json.dumps(grid), truth) < 1 / 36 < score("iou", json.dumps([0.25, 0.25, 0.75, 0.75]), truth)


def test_an_unusable_box_counts_as_superfluous() -> None:
    assert score("iou", "[0, 0, 0.5, 1], [nan, 0, 1, 1]", LEFT) == 0.5
    assert score("iou", "[0, 0, 0.5, 1], [1, 1, 0, 0], [0, 0, 1e999, 1]", [LEFT, RIGHT]) == pytest.approx(1 / 3)


def test_more_than_the_allowed_number_of_boxes_score_zero_with_the_reason() -> None:
    truth = [LEFT, RIGHT]
    too_many = get("iou")(rollout(json.dumps([LEFT] * (MOST + 1)), truth))
    assert (too_many.value, too_many.details["why"]) == (0.0, f"more than {MOST} boxes or points")
    assert get("iou")(rollout(json.dumps([LEFT] * MOST), truth)).value > 0.0


def test_the_largest_number_of_boxes_is_matched_within_five_seconds() -> None:
    side = np.random.default_rng(0).uniform(0, 0.5, (MOST, 2))
    boxes = np.concatenate([side, side + 0.3], 1).round(3).tolist()
    start = time.process_time()
    assert score("iou", json.dumps(boxes[::-1]), boxes) == pytest.approx(1.0)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("truth", "said"),
    [([], "takes"), ([LEFT, [0, 0, 2, 1]], "outside"), ([LEFT, [0, 0]], "takes"), ([LEFT] * (MOST + 1), "at most")],
)
def test_a_malformed_list_of_true_boxes_makes_the_row_invalid(truth: Any, said: str) -> None:
    with pytest.raises(Invalid, match=f"row-1.*{said}"):
        score("iou", "[0, 0, 1, 1]", truth)


@pytest.mark.parametrize("truth", [[0.1, 0.25, 1 / 3, 1e-5 + 0.5], [LEFT, RIGHT, TOP]])
def test_a_response_that_states_the_ground_truth_scores_highest(truth: Any) -> None:
    assert_truth_scores_highest("iou", truth)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_megabytes_of_hostile_text_score_zero_within_two_seconds(text: str) -> None:
    assert_lowest_soon("iou", TRUE_BOX, text)


@pytest.mark.parametrize("truth", [[0.01, 0.01, 0.02, 0.02], [[0.01, 0.01, 0.02, 0.02], [0.03, 0.03, 0.04, 0.04]]])
@pytest.mark.parametrize("text", HOSTILE_SHAPES.values(), ids=HOSTILE_SHAPES.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(truth: Any, text: str) -> None:
    assert_lowest_soon("iou", truth, text)
