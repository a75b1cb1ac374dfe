"""Tests that boxes and points are read from answers and matched one to one."""

import numpy as np
import pytest

from rewards.geometry import BOXES, POINTS, best_pairs, box_iou, shapes
from tests.support.reward_samples import score

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]


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
def test_two_boxes_are_read_in_all_usual_notations_and_as_one_list(text: str) -> None:
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
def test_two_points_are_read_in_all_usual_notations_and_as_one_list(text: str) -> None:
    assert shapes(POINTS, text) == shapes(POINTS, text, last_list=True) == [(0.5, 0.5), (0.1, 0.2)]
    assert score("count", text, [[0.1, 0.2], [0.5, 0.5]]) == 1.0


def test_coordinates_in_a_boxed_answer_need_no_brackets() -> None:
    assert score("iou", r"So it is \boxed{0, 0, 0.5, 1}.", LEFT) == 1.0
    assert score("point_distance", r"\boxed{0.5, 0.5}", [0.5, 0.5]) == 1.0


def test_boxes_that_touch_or_lie_apart_have_iou_zero_and_tiny_ones_do_not_divide_by_zero() -> None:
    assert box_iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0.0
    assert box_iou((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert box_iou((0, 0, 1e-200, 1e-200), (0, 0, 1e-200, 1e-200)) == 0.0


def test_pairs_have_the_largest_sum_and_are_not_chosen_greedily() -> None:
    # A greedy choice would first take the pair with the value 0.9. Then only the pair with the value 0 would be left,
    # and the sum would be 0.9. The largest sum is 0.8 + 0.8 = 1.6.
    assert best_pairs(np.array([[0.9, 0.8], [0.8, 0.0]])).tolist() == [0.8, 0.8]
    assert best_pairs(np.array([[0.2, 0.7, 0.1]])).tolist() == [0.7]
