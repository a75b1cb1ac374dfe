"""Tests the reward `gui_click`: clicks that hit, nearly hit or miss, and answers that declare the task done."""

from typing import Any

import pytest

from rewards import Invalid, get
from tests.support.reward_samples import HOSTILE_SHAPES, assert_lowest_soon, picture, rollout, score

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
def test_declaring_the_task_done_scores_two_if_right_and_minus_a_half_if_wrong(text: str) -> None:
    assert score("gui_click", text, DONE) == 2.0
    assert score("gui_click", text, BUTTON) == -0.5


@pytest.mark.parametrize(
    "text",
    ["", "the button", "click(0.1, 0.1)", "scroll(0.5, 0.5)", "click(nan, 0.5)", "It will be done soon", "<think>"],
)
def test_text_without_a_right_click_is_a_miss(text: str) -> None:
    assert score("gui_click", text, BUTTON) == -1.0


def test_a_click_into_an_element_that_mostly_overlaps_the_true_one_is_near() -> None:
    # The button contains 2/3 of the area of the element [0.4, 0.4, 0.6, 0.7].
    screen = BUTTON | {"elements": [[0.4, 0.4, 0.6, 0.7], [0, 0, 1, 1], BUTTON["box"]]}
    assert score("gui_click", "click(0.5, 0.65)", screen) == 0.5
    assert score("gui_click", "click(0.9, 0.9)", screen) == -1.0
    assert score("gui_click", "click(0.5, 0.65)", BUTTON) == -1.0


def test_clicks_may_be_in_pixels() -> None:
    bound = get("gui_click", {"coordinates": "pixel"})
    assert bound(rollout("click(100, 50)", {"box": [80, 40, 120, 60]}, (picture(200, 100),))).value == 1.0


@pytest.mark.parametrize(
    "truth",
    [None, [0, 0, 1, 1], {}, {"done": False}, {"box": [0, 0]}, BUTTON | DONE, BUTTON | {"elements": [[0, 0, 0, 0]]}],
)
def test_a_malformed_ground_truth_makes_the_row_invalid(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("gui_click", "click(0.5, 0.5)", truth)


@pytest.mark.parametrize("truth", [BUTTON, DONE])
@pytest.mark.parametrize("text", HOSTILE_SHAPES.values(), ids=HOSTILE_SHAPES.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(truth: Any, text: str) -> None:
    assert_lowest_soon("gui_click", truth, text)
