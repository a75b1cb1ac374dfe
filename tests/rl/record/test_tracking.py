"""Tests that metrics reach the trackers of the recipe, and that the run continues if a tracker fails."""

import importlib.util
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from rl.record import tracking
from rl.record.tracking import Trackers, check_trackers
from tests.support.patience import Deadline


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Returns all pairs (step, value) of one scalar. TensorBoard's own code reads these pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_each_number_at_its_iteration(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path)
    for step in (0, 1):
        trackers.log(step, {"iteration": step, "stage": "rlvr", "reward/mean": step / 2})
    trackers.close()
    assert curve(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.5)]


def test_after_a_resume_tensorboard_shows_each_iteration_once(tmp_path: Path) -> None:
    for first_step, value in ((0, 1.0), (2, 2.0)):  # the first run ends at step 3, but its checkpoint is of step 1
        trackers = Trackers(["tensorboard"], tmp_path, first_step=first_step)
        for step in range(first_step, 4):
            trackers.log(step, {"reward/mean": value})
        trackers.close()
    assert curve(tmp_path, "reward/mean") == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_wandb_gets_each_number_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first_step in (0, 1):
        trackers = Trackers(["wandb"], tmp_path, recipe={"seed": 1}, first_step=first_step)
        trackers.log(first_step, {"iteration": first_step, "stage": "rlvr", "reward/mean": first_step + 0.125})
        trackers.close()
    identity = (tmp_path / "tracking" / "wandb_id").read_text()
    found = [0, 0]
    deadline = Deadline(30)  # in offline mode, wandb's process may still write after finish() has returned
    while found != [1, 1] and not deadline.passed():
        time.sleep(0.1)
        files = [file.read_bytes() for file in tmp_path.rglob(f"run-{identity}.wandb")]
        assert len(files) == 2
        found = [sum(value in f and b"reward/mean" in f for f in files) for value in (b"0.125", b"1.125")]
    assert found == [1, 1]


def test_an_unknown_tracker_and_a_missing_package_are_reported_before_a_tracker_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="there is no tracker 'tensorbord'; choose from tensorboard, wandb, mlflow"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package of mlflow is missing; run `pip install mlflow`"):
        check_trackers(["mlflow"])


class Away:
    """A tracker whose server does not answer."""

    def __init__(self, folder: Path, recipe: Mapping[str, object], first_step: int) -> None:
        self.calls = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("no route")

    def close(self) -> None:
        raise ConnectionError("no route")


def test_a_tracker_that_fails_is_reported_once_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "away", ("json", "json", Away))
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(["away"], tmp_path)
        trackers.log(1, {"reward/mean": 1.0})
        trackers.log(2, {"reward/mean": 1.0})
        trackers.close()
    assert [record.getMessage().split(" failed")[0] for record in caplog.records] == ["log.trackers: away"]
