"""Tests that the next iteration is sampled while the current iteration trains: which steps run in parallel, and which
steps wait for each other."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rl.stop import Stop
from rl.types import Rollout, Scored
from stages.ahead import Abandoned, Ahead
from stages.loop import Clock, LoopState, Services, ppo_iteration
from tests.support.loop import PROMPTS, Scores, Scripted, policy_of, right, scripted_services


def test_take_returns_the_result_and_calls_meanwhile_in_the_waiting_thread() -> None:
    ahead: Ahead[str] = Ahead()
    go, calling = threading.Event(), []

    def meanwhile() -> None:
        calling.append(threading.current_thread())
        go.set()

    ahead.start(2, lambda: str(go.wait()))
    assert ahead.has(2) and not ahead.has(1)
    assert ahead.take(2, meanwhile) == "True"
    assert set(calling) == {threading.main_thread()} and not ahead.has(2)


def test_an_error_in_the_second_thread_is_raised_by_take() -> None:
    ahead: Ahead[str] = Ahead()

    def fail() -> str:
        raise Stop("endpoint judge stays away", saves=True)

    ahead.start(1, fail)
    ahead.settle()
    with pytest.raises(Stop, match="judge stays away"):
        ahead.take(1, lambda: None)


def test_an_abandoned_task_ends_at_its_next_check() -> None:
    ahead: Ahead[str] = Ahead()
    started, ended = threading.Event(), []

    def make() -> str:
        started.set()
        try:
            while True:
                ahead.check()
        except Abandoned:
            ended.append(True)
            raise

    ahead.start(1, make)
    started.wait()
    ahead.abandon()
    assert ended == [True]


def test_a_second_task_cannot_start_before_the_first_result_was_taken() -> None:
    ahead: Ahead[str] = Ahead()
    ahead.start(1, str)
    with pytest.raises(RuntimeError, match="the result of task 1 has not been taken yet"):
        ahead.start(2, str)


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return scripted_services(tmp_path)


def with_staleness(services: Services, value: int) -> Services:
    rollout = services.config.rollout.model_copy(update={"max_staleness": value})
    return replace(services, config=services.config.model_copy(update={"rollout": rollout}))


class Recording(Scripted):
    """A sampler that records two numbers for each iteration: the number of the iteration, and the policy step of the
    weights that sample it."""

    def __init__(self, policy) -> None:
        super().__init__(policy)
        self.sampled: list[tuple[int, int]] = []

    def sample(self, prompts, per_prompt, iteration):
        self.sampled.append((iteration, self.policy_step))
        return super().sample(prompts, per_prompt, iteration)


@pytest.mark.parametrize("value, expected, lags", [
    (0, [(1, 0), (2, 1), (3, 2)], [0, 0, 0]),
    (1, [(1, 0), (2, 0), (3, 1)], [0, 1, 1]),
])  # fmt: skip
def test_staleness_is_the_number_of_updates_that_the_sampling_weights_lag_behind(
    services, value, expected, lags
) -> None:
    sampler, state = Recording(policy_of(services)), LoopState()
    services = replace(with_staleness(services, value), sampler=sampler)
    staleness = []
    for iteration in range(1, 4):
        following = PROMPTS if iteration < 3 else []
        metrics, scored = ppo_iteration(iteration, PROMPTS, following, services, state, Clock())
        staleness.append(metrics["rollout/staleness"])
        assert len(scored) == 12
        state.ahead.settle()
    assert sampler.sampled == expected
    assert staleness == lags


def test_too_many_invalid_samples_of_the_next_iteration_do_not_stop_this_one(services: Services) -> None:
    taken, state = [], LoopState()

    def only_the_first_iteration(rollout: Rollout) -> Scored:
        taken.append(rollout)
        return right(rollout) if len(taken) <= 12 else Scored(rollout, 0.0, "judge away")

    services = replace(with_staleness(services, 1), scorer=Scores(only_the_first_iteration))
    metrics, _ = ppo_iteration(1, PROMPTS, PROMPTS, services, state, Clock())
    assert metrics["reward/mean"] == pytest.approx(1 / 3)
    with pytest.raises(Stop, match="12 of 12 samples are invalid"):
        ppo_iteration(2, PROMPTS, [], services, state, Clock())
