"""Rewards for boxes, points, counts and clicks: how answers are read, matched and paid."""

import json
import time
from typing import Any

import numpy as np
import pytest

from rewards import Invalid, get
from rewards.geometry import BOXES, MOST, POINTS, box_iou, matched, shapes
from tests.rewards.test_registry import HOSTILE, MEGABYTE, picture, rollout, score

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
TOP = [0, 0, 1, 0.5]

# Reading


@pytest.mark.parametrize(
    "text",
    [
        "[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]",
        "[0, 0, 0.5, 1], [0.5, 0, 1, 1]",
        "1. [0, 0, 0.5, 1]\n2. [0.5, 0, 1, 1]",
        "(0, 0, 0.5, 1) and (0.5, 0, 1, 1)",
        "(0, 0), (0.5, 1); (0.5, 0), (1, 1)",
        '```json\n[{"bbox_2d": [0, 0, 0.5, 1], "label": "a cat"}, {"bbox_2d": [0.5, 0, 1, 1], "score": 0.5}]\n```',
        '{"boxes": [{"box": [0, 0, 0.5, 1]}, {"bbox": [0.5, 0, 1, 1]}]}',
        "[{'box': [0, 0, 0.5, 1]}, {'box': [0.5, 0, 1, 1]}]",
        '[{"x1": 0, "y1": 0, "x2": 0.5, "y2": 1}, {"x_min": 0.5, "y_min": 0, "x_max": 1, "y_max": 1}]',
        "<box>0 0 0.5 1</box><box>0.5 0 1 1</box>",
        "<|box_start|>(0,0),(0.5,1)<|box_end|> <|box_start|>(0.5,0),(1,1)<|box_end|>",
        "I see [0.1, 0.1, 0.2, 0.2]. Answer: [0, 0, 0.5, 1], [0.5, 0, 1, 1]",
        r"[0.1, 0.1, 0.2, 0.2] \boxed{[0, 0, 0.5, 1], [0.5, 0, 1, 1]}",
    ],
)
def test_two_boxes_are_read_in_the_usual_ways_to_write_them_and_as_one_list(text: str) -> None:
    two = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert shapes(BOXES, text) == shapes(BOXES, text, last_list=True) == two
    assert score("iou", text, [RIGHT, LEFT]) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "[[0.5, 0.5], [0.1, 0.2]]",
        "(0.5, 0.5), (0.1, 0.2)",
        '[{"point_2d": [0.5, 0.5], "label": "cat"}, {"point": [0.1, 0.2]}]',
        '[{"x": 0.5, "y": 0.5}, {"y2": 3, "x": 0.1, "y": 0.2}]',
        "<point>0.5 0.5</point><point>0.1 0.2</point>",
        '<point x="0.5" y="0.5" alt="a cat">a cat</point> <point x="0.1" y="0.2" alt="a dog">a dog</point>',
        '<points x1="0.5" y1="0.5" x2="0.1" y2="0.2" alt="cats">cats</points>',
    ],
)
def test_two_points_are_read_in_the_usual_ways_to_write_them_and_as_one_list(text: str) -> None:
    assert shapes(POINTS, text) == shapes(POINTS, text, last_list=True) == [(0.5, 0.5), (0.1, 0.2)]
    assert score("count", text, [[0.1, 0.2], [0.5, 0.5]]) == 1.0


def test_a_box_in_a_final_answer_may_do_without_brackets_of_its_own() -> None:
    assert score("iou", r"So it is \boxed{0, 0, 0.5, 1}.", LEFT) == 1.0
    assert score("point_distance", r"\boxed{0.5, 0.5}", [0.5, 0.5]) == 1.0


# Boxes


def test_boxes_that_touch_or_lie_apart_have_iou_zero_and_tiny_ones_do_not_divide_by_zero() -> None:
    assert box_iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0.0
    assert box_iou((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert box_iou((0, 0, 1e-200, 1e-200), (0, 0, 1e-200, 1e-200)) == 0.0


def test_several_boxes_earn_their_powers_over_the_larger_number() -> None:
    # left is right (1), top covers half of the other (1/4 of 1 in common, 3/4 together: 1/3)
    answer = json.dumps([TOP, LEFT])
    assert score("iou", answer, [LEFT, RIGHT], power=1) == pytest.approx((1 + 1 / 3) / 2)
    assert score("iou", answer, [LEFT, RIGHT], power=2) == pytest.approx((1 + 1 / 9) / 2)
    assert score("iou", answer, [LEFT, RIGHT, [0, 0, 0.1, 0.1]], power=1) < score("iou", answer, [LEFT, RIGHT], power=1)


def test_pairs_are_chosen_for_the_largest_sum_and_not_one_after_the_other() -> None:
    # taking the best pair first leaves 0.9 + 0; the largest sum is 0.8 + 0.8
    assert matched(np.array([[0.9, 0.8], [0.8, 0.0]])).tolist() == [0.8, 0.8]
    assert matched(np.array([[0.2, 0.7, 0.1]])).tolist() == [0.7]


def test_a_missing_and_a_superfluous_box_cost_the_same() -> None:
    assert score("iou", json.dumps([LEFT]), [LEFT, RIGHT]) == 0.5
    assert score("iou", json.dumps([LEFT, RIGHT]), [LEFT]) == 0.5


def test_the_same_box_twice_matches_one_true_box_only() -> None:
    assert score("iou", json.dumps([LEFT, LEFT]), [LEFT, RIGHT]) == 0.5


def test_a_corrected_box_counts_but_a_listed_guess_costs() -> None:
    assert score("iou", "At first sight [0.5, 0, 1, 1], but no: [0, 0, 0.5, 1]", LEFT) == 1.0
    assert score("iou", "[0.5, 0, 1, 1], [0, 0, 0.5, 1]", LEFT) == 0.5


def test_spraying_boxes_earns_less_than_the_middle_guess_alone() -> None:
    grid = [[x / 10, y / 10, x / 10 + 0.5, y / 10 + 0.5] for x in range(6) for y in range(6)]
    truth = [0.13, 0.32, 0.61, 0.86]
    assert score("iou", json.dumps(grid), truth) < 1 / 36 < score("iou", json.dumps([0.25, 0.25, 0.75, 0.75]), truth)


def test_a_box_that_can_not_be_used_is_a_superfluous_one() -> None:
    assert score("iou", "[0, 0, 0.5, 1], [nan, 0, 1, 1]", LEFT) == 0.5
    assert score("iou", "[0, 0, 0.5, 1], [1, 1, 0, 0], [0, 0, 1e999, 1]", [LEFT, RIGHT]) == pytest.approx(1 / 3)


def test_too_many_boxes_or_points_earn_nothing_and_say_so() -> None:
    for target, shape, truth in [("iou", LEFT, [LEFT, RIGHT]), ("count", [0.5, 0.5], [[0.5, 0.5], [0.1, 0.1]])]:
        found = get(target)(rollout(json.dumps([shape] * (MOST + 1)), truth))
        assert (found.value, found.details["why"]) == (0.0, f"more than {MOST} boxes or points")
        assert get(target)(rollout(json.dumps([shape] * MOST), truth)).value > 0.0


def test_many_boxes_are_matched_soon() -> None:
    side = np.random.default_rng(0).uniform(0, 0.5, (MOST, 2))
    boxes = np.concatenate([side, side + 0.3], 1).round(3).tolist()
    start = time.process_time()
    assert score("iou", json.dumps(boxes[::-1]), boxes) == pytest.approx(1.0)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("truth", "said"),
    [([], "takes"), ([LEFT, [0, 0, 2, 1]], "outside"), ([LEFT, [0, 0]], "takes"), ([LEFT] * (MOST + 1), "most is")],
)
def test_a_bad_list_of_true_boxes_is_a_fault_of_the_row(truth: Any, said: str) -> None:
    with pytest.raises(Invalid, match=f"row-1.*{said}"):
        score("iou", "[0, 0, 1, 1]", truth)


# Points


@pytest.mark.parametrize(("point", "value"), [("(0.5, 0.3)", 1.0), ("(0.4, 0.2)", 1.0), ("(0.5, 0.41)", 0.0)])
def test_a_point_into_a_true_box_earns_all_or_nothing_and_edges_are_inside(point: str, value: float) -> None:
    assert score("point_distance", point, [0.4, 0.2, 0.6, 0.4]) == value


def test_a_list_of_points_earns_its_best_divided_by_their_number() -> None:
    # 0.1 away of radius 0.2, and far off
    assert score("point_distance", "[[0.5, 0.6], [0, 0]]", [0.5, 0.5]) == pytest.approx(0.5 / 2)
    assert score("point_distance", "[[0.5, 0.3], [0, 0], [1, 1]]", [0.4, 0.2, 0.6, 0.4]) == pytest.approx(1 / 3)


def test_many_true_points_belong_to_count() -> None:
    with pytest.raises(Invalid, match=r"row-1 .*count takes many"):
        score("point_distance", "[0.5, 0.5]", [[0.5, 0.5], [0.1, 0.1]])


# Counts


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
def test_a_three_that_is_part_of_something_else_is_no_count(text: str) -> None:
    assert score("count", text, 3) == 0.0


@pytest.mark.parametrize(("text", "number"), [("twenty-one", 21), ("1,250", 1250), ("none", 0), ("forty", 40)])
def test_larger_numbers_and_none_are_understood(text: str, number: int) -> None:
    assert score("count", text, number) == 1.0


def test_points_earn_by_distance_over_the_larger_number() -> None:
    truth = [[0.2, 0.2], [0.8, 0.8]]
    # one exact, one 0.05 away of radius 0.1: (1 + 0.5) / 2; a third point: / 3
    assert score("count", "[[0.8, 0.85], [0.2, 0.2]]", truth) == pytest.approx(0.75)
    assert score("count", "[[0.8, 0.85], [0.2, 0.2], [0.5, 0.5]]", truth) == pytest.approx(0.5)
    assert score("count", "[[0.2, 0.2]]", truth) == 0.5


def test_a_bare_number_earns_nothing_where_points_are_asked_for() -> None:
    found = get("count")(rollout("There are 2.", [[0.2, 0.2], [0.8, 0.8]]))
    assert (found.value, found.details) == (0.0, {"why": "no point in the answer"})


@pytest.mark.parametrize("truth", [None, True, "many", 2.5, -1, "nan", "inf", "", {"n": 3}, [], [[0.5, 0.5], [2, 0]]])
def test_a_true_count_that_is_none_is_a_fault_of_the_row(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("count", "3", truth)


# Clicks

BUTTON = {"box": [0.4, 0.4, 0.6, 0.6]}
DONE = {"done": True}


@pytest.mark.parametrize(
    "text",
    [
        "click(0.5, 0.5)",
        "click(x=0.5, y=0.5)",
        "pyautogui.click(0.6, 0.4)",
        "PacoreResult: I stop at the button.\nAction: click(start_box='(0.5, 0.5)')",
        '{"action": "click", "point": [0.5, 0.5]}',
        "<point>0.5 0.5</point>",
        "[0.3, 0.3, 0.7, 0.7]",
        "I am done looking: (0.5, 0.5)",
        "done() - no, click(0.5, 0.5)",
    ],
)
def test_a_click_into_the_element_is_a_hit(text: str) -> None:
    assert score("gui_click", text, BUTTON) == 1.0
    assert score("gui_click", text, DONE) == -1.0


@pytest.mark.parametrize(
    "text",
    [
        "done()",
        "DONE",
        "Finished.",
        "finished(content='all is set')",
        '{"action": "terminate", "status": "success"}',
        '{"action_type": "done"}',
        "click(0.5, 0.5)\nAction: STOP",
    ],
)
def test_declaring_completion_is_best_when_done_and_an_early_stop_otherwise(text: str) -> None:
    assert score("gui_click", text, DONE) == 2.0
    assert score("gui_click", text, BUTTON) == -0.5


@pytest.mark.parametrize(
    "text",
    ["", "the button", "click(0.1, 0.1)", "scroll(0.5, 0.5)", "click(nan, 0.5)", "It will be done soon", "<think>"],
)
def test_all_else_is_a_miss(text: str) -> None:
    assert score("gui_click", text, BUTTON) == -1.0


def test_a_click_into_an_element_that_mostly_overlaps_the_true_one_is_near() -> None:
    # [0.4, 0.4, 0.6, 0.7] has 2/3 of its area in common with the button
    screen = BUTTON | {"elements": [[0.4, 0.4, 0.6, 0.7], [0, 0, 1, 1], BUTTON["box"]]}
    assert score("gui_click", "click(0.5, 0.65)", screen) == 0.5
    assert score("gui_click", "click(0.9, 0.9)", screen) == -1.0
    assert score("gui_click", "click(0.5, 0.65)", BUTTON) == -1.0


def test_clicks_may_be_pixels_of_the_rows_picture() -> None:
    bound = get("gui_click", {"coordinates": "pixel"})
    assert bound(rollout("click(100, 50)", {"box": [80, 40, 120, 60]}, (picture(200, 100),))).value == 1.0


@pytest.mark.parametrize(
    "truth",
    [None, [0, 0, 1, 1], {}, {"done": False}, {"box": [0, 0]}, BUTTON | DONE, BUTTON | {"elements": [[0, 0, 0, 0]]}],
)
def test_a_screen_without_a_usable_truth_is_a_fault_of_the_row(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("gui_click", "click(0.5, 0.5)", truth)


# All of them


@pytest.mark.parametrize(
    ("target", "truth"),
    [
        ("iou", [0.1, 0.25, 1 / 3, 1e-5 + 0.5]),
        ("iou", [LEFT, RIGHT, TOP]),
        ("point_distance", [0.123456789, 1 / 3]),
        ("point_distance", [0.1, 0.2, 0.3, 0.4]),
        ("count", 7),
        ("count", "7"),
        ("count", [[0.1, 0.2], [1 / 3, 0.4]]),
    ],
)
def test_a_response_that_states_the_truth_scores_highest(target: str, truth: Any) -> None:
    declared = get(target).reward
    assert declared.truth_as_text
    assert score(target, declared.truth_as_text(truth), truth) == declared.highest


MORE_HOSTILE = HOSTILE | {
    "many boxes": "[" + "[0, 0, 0.9, 0.9]," * 100_000 + "]",
    "many points": "(0.9,0.9) " * 100_000,
    "many bad boxes": "[nan,0,1,1]" * 100_000,
    "deep JSON": '{"box":' * (MEGABYTE // 7) + "1",
    "half a box": "[0.1,0.2,0.3 " * (MEGABYTE // 13),
    "names": "x1=1 y1=1 x2=1 " * (MEGABYTE // 15),
    "quotes": "[0,0,1,1]" + '"' * 200 + "[0,0," + "'\"" * (MEGABYTE // 2),
    "tower": "9^9^9^9",
    "exponents": "[1e999999,1e-999999]" * 50_000,
    "actions": "action:" * (MEGABYTE // 7) + "Xdone(",
    "spelled": "twenty-" * (MEGABYTE // 7),
    "marked digits": "Answer: " + "1" * 4000,
}


@pytest.mark.parametrize(
    ("target", "truth"),
    [
        ("iou", [0.01, 0.01, 0.02, 0.02]),
        ("iou", [[0.01, 0.01, 0.02, 0.02], [0.03, 0.03, 0.04, 0.04]]),
        ("point_distance", [0.1, 0.1]),
        ("point_distance", [0.1, 0.1, 0.2, 0.2]),
        ("count", 5),
        ("count", [[0.1, 0.1], [0.2, 0.2]]),
        ("gui_click", BUTTON),
        ("gui_click", DONE),
    ],
)
@pytest.mark.parametrize("text", MORE_HOSTILE.values(), ids=MORE_HOSTILE.keys())
def test_hostile_text_scores_the_lowest_soon(target: str, truth: Any, text: str) -> None:
    bound = get(target)
    _ = bound.scorer
    start = time.process_time()
    assert bound(rollout(text, truth)).value == bound.reward.lowest
    assert time.process_time() - start < 2.0
