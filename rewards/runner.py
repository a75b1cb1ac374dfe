"""Runs a recipe's rewards: Rollout in, Scored out, and nothing that a reward does hurts the run."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rewards.pool import Job, Outcome, WorkerPool
from rewards.registry import BoundReward, get
from rewards.worker import Task
from rl.types import Prompt, Rollout, Scored


class RewardSpec(Protocol):
    """What a recipe says of one task's reward."""

    @property
    def use(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def memory_mb(self) -> int: ...


class RewardRunner:
    """Scores rollouts with the reward of their task, in `workers` processes that can be killed.

    tasks       task -> its reward: `use` and `params` as `rewards.get` takes them; `timeout_s`, wall-clock
                seconds for scoring one sample (a group gets that times its size), counted from when the
                reward is loaded; `memory_mb`, MiB that scoring may take on top of what loading took
    base_dir    the folder `file.py:Name` is relative to
    setup_s     seconds that importing a reward and its `setup()` may take

    Raises ValueError, before any process is started, for a reward or parameter that does not exist. A sample
    whose reward raises, dies or returns no number comes back invalid, with the reason; so does one that ran
    out of time or memory, unless the reward declares on_timeout="lowest". Other samples never notice.
    """

    def __init__(
        self,
        tasks: Mapping[str, RewardSpec],
        base_dir: str | Path = ".",
        workers: int = 2,
        setup_s: float = 300.0,
    ):
        if workers < 1:
            raise ValueError(f"{workers} reward workers; at least 1 is needed")
        folder = Path(base_dir).resolve()
        self._rewards = {task: _get(task, spec, folder) for task, spec in tasks.items()}
        self._timeout_s = {task: spec.timeout_s for task, spec in tasks.items()}
        told = {task: Task(s.use, dict(s.params), s.memory_mb) for task, s in tasks.items()}
        self._pool = WorkerPool(told, folder, workers, setup_s)

    def lowest(self, task: str) -> float:
        """The least this task's reward can be."""
        return self._reward(task).reward.lowest

    def highest(self, task: str) -> float:
        """What a fully right response to this task gets."""
        return self._reward(task).reward.highest

    def is_group(self, task: str) -> bool:
        """Whether the task's reward wants all rollouts of a prompt at once."""
        return self._reward(task).reward.group

    def check_tasks(self, prompts: Iterable[Prompt]) -> None:
        """Raises ValueError for a row whose task has no reward."""
        for prompt in prompts:
            if prompt.task not in self._rewards:
                raise ValueError(f"row {prompt.id!r}: {self._no_reward(prompt.task)}")

    def warm(self) -> Future[float]:
        """Starts the processes and loads every reward in each, without waiting for it.

        The future holds the seconds that took, or RuntimeError if a reward's setup failed.
        """
        return self._pool.warm()

    def submit(self, rollout: Rollout) -> Future[Scored]:
        """Scores one rollout as soon as a process is free. Group rewards take submit_group."""
        task = rollout.prompt.task
        if self.is_group(task):
            raise ValueError(f"the reward of task {task!r} scores all rollouts of a prompt: use submit_group")
        return self._put([rollout])[0]

    def submit_group(self, rollouts: Sequence[Rollout]) -> list[Future[Scored]]:
        """Scores all rollouts of one prompt, in order: together for a group reward, else each by itself."""
        if rollouts and self.is_group(rollouts[0].prompt.task):
            return self._put(rollouts)
        return [self.submit(rollout) for rollout in rollouts]

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Scores all of these and waits; the result has their order. A group is what shares a prompt id."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault((rollout.prompt.task, rollout.prompt.id), []).append(i)
        futures: dict[int, Future[Scored]] = {}
        for members in groups.values():
            submitted = self.submit_group([rollouts[i] for i in members])
            futures.update(zip(members, submitted, strict=True))
        return [futures[i].result() for i in range(len(rollouts))]

    def close(self) -> None:
        """Ends all processes, also those in the middle of a sample; what is unfinished is cancelled."""
        self._pool.close()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, rollouts: Sequence[Rollout]) -> list[Future[Scored]]:
        """One job for the workers, unless every one of the rollouts is truncated: those need no reward."""
        futures: list[Future[Scored]] = [Future() for _ in rollouts]
        task = rollouts[0].prompt.task
        again = self._reward(task).reward.on_timeout == "lowest"
        job = Job(task, rollouts, self._timeout_s[task] * len(rollouts), again)
        job.outcomes.add_done_callback(partial(self._settle, rollouts, futures))
        if all(rollout.finish == "length" for rollout in rollouts):
            job.outcomes.set_result([{}] * len(rollouts))
        else:
            self._pool.put(job)
        return futures

    def _settle(
        self,
        rollouts: Sequence[Rollout],
        futures: Sequence[Future[Scored]],
        outcomes: Future[list[Outcome]],
    ) -> None:
        for i, (rollout, future) in enumerate(zip(rollouts, futures, strict=True)):
            if outcomes.cancelled():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            if error := outcomes.exception():
                future.set_exception(error)
            else:
                future.set_result(self._scored(rollout, outcomes.result()[i]))

    def _scored(self, rollout: Rollout, outcome: Outcome) -> Scored:
        reward = self._rewards[rollout.prompt.task].reward
        if rollout.finish == "length":  # whatever a group reward made of it
            outcome = {"value": reward.lowest, "details": {"truncated": True}}
        elif "exhausted" in outcome and reward.on_timeout == "lowest":
            outcome = {"value": reward.lowest, "details": {"why": outcome["exhausted"]}}
        if "value" not in outcome:
            why = outcome.get("invalid") or outcome["exhausted"]
            return Scored(rollout, reward.lowest, f"reward {reward.name}: {why}")
        return Scored(rollout, outcome["value"], None, {reward.name: outcome["value"]}, outcome["details"])

    def _reward(self, task: str) -> BoundReward:
        if task not in self._rewards:
            raise ValueError(self._no_reward(task))
        return self._rewards[task]

    def _no_reward(self, task: str) -> str:
        known = ", ".join(self._rewards) or "no task"
        return f"task {task!r} has no reward; the recipe has rewards for {known}"


def _get(task: str, spec: RewardSpec, base_dir: Path) -> BoundReward:
    try:
        return get(spec.use, spec.params, base_dir)
    except ValueError as e:
        raise ValueError(f"rewards.{task}: {e}") from e
