"""Tests that the ground truths of rows are offered to their rewards."""

from pathlib import Path

import pytest

from rewards.running import truths
from rewards.running.truths import offered, refusals
from rl.config import PenaltySpec, RewardSpec
from rl.types import Prompt


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def test_accepted_ground_truths_are_offered_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("math", "5"), row("math", r"\frac{1}{")]
    assert [why is not None for why in refusals(TASKS, rows)] == [False, True]
    monkeypatch.setattr(truths, "RewardRunner", None)  # no process can be started any more
    assert refusals(TASKS, rows[:1]) == [None]
    changed = {"math": [RewardSpec(use="math_verify", params={"significant": 4})]}
    with pytest.raises(TypeError):  # other parameters: the ground truth is offered again
        refusals(changed, rows[:1])
