"""Tests that a run checks the GPUs of the cluster before it starts a process. Whole runs are in tests/runs."""

import pytest

from rl.recipe.resolve import load
from stages import processes
from stages.plan import Plan, make_plan
from stages.processes import Processes, Restarts
from tests.support.command import ROOT


class Started(Exception):
    """The check of the GPUs is done, and the first process starts."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    options = ["learner.device=cuda", "learner.ranks=2", "rollout.workers=3", "data.eval=[]", "max_start_s=60"]
    return make_plan(load(ROOT / "recipes/rlvr.yaml", profile="cpu", overrides=options).config)


def said(plan: Plan, monkeypatch: pytest.MonkeyPatch, *, total: int, free: int) -> list[str]:
    """Returns the messages of a run in a cluster with `total` GPUs, before the run starts its first process."""
    messages: list[str] = []

    def place(*arguments: object, **options: object) -> None:
        raise Started

    monkeypatch.setattr(processes, "gpus", lambda: total)
    monkeypatch.setattr(processes, "free_gpus", lambda: free)
    monkeypatch.setattr(processes, "place", place)
    with pytest.raises(Started):
        Processes(plan, Restarts(1, messages.append), verbose=False)
    return messages


def test_a_run_says_that_it_waits_for_gpus_which_other_programs_use(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (message,) = said(plan, monkeypatch, total=8, free=2)
    assert "7 GPUs are needed, but other programs of the cluster use all except 2 of the 8 GPUs" in message
    assert "for up to 60 s (max_start_s)" in message
    assert said(plan, monkeypatch, total=8, free=7) == []


def test_a_run_in_a_cluster_with_too_few_gpus_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the cluster has 6 GPUs, but 7 are needed \(3 for rollout workers, 2 for"):
        said(plan, monkeypatch, total=6, free=6)
