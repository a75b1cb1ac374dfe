"""Tests that the ground truths of rows are offered to their rewards."""

from rewards.running.truths import offered, refusals
from rl.config import PenaltySpec, RewardSpec
from rl.types import Prompt

TASKS = {
    "math": [RewardSpec(use="math_verify", penalties=(PenaltySpec(use="citation"),))],
    "box": [RewardSpec(use="iou"), RewardSpec(use="format_tags")],
    "click": [RewardSpec(use="gui_click")],
    "judged": [RewardSpec(use="verifier", params={"endpoint": "judge"})],
}


def row(task: str, truth: object) -> Prompt:
    return Prompt(f"{task}-row", task, (), ground_truth=truth)


def test_only_rewards_that_read_the_ground_truth_themselves_are_offered_it() -> None:
    assert {task: [spec.use for spec in specs] for task, specs in offered(TASKS).items()} == {
        "math": ["math_verify"], "box": ["iou"], "click": ["gui_click"],
    }  # fmt: skip


def test_the_ground_truths_that_a_reward_refuses_are_found_with_the_reason() -> None:
    rows = [
        row("math", r"\frac{1}{2}"),
        row("math", r"\frac{1}{"),
        row("box", [0.1, 0.2, 0.3, 0.4]),
        row("box", [10, 20, 300, 400]),
        row("click", {"box": [0.1, 0.2, 0.3, 0.4]}),
        row("click", "x"),
        row("judged", 5),
    ]
    found = refusals(TASKS, rows)
    assert [why is not None for why in found] == [False, True, False, True, False, True, False]
    assert "does not parse as mathematics" in str(found[1])
    assert "lies outside its picture" in str(found[3])


def test_no_process_is_started_if_there_is_nothing_to_offer() -> None:
    assert refusals(TASKS, [row("judged", 5)]) == [None]
