"""Runs a recipe's rewards, which score a Rollout, and its row judges, which score a Prompt.

Rewards run in other processes, so that a reward that hangs, dies or uses too much memory does not harm the run. The
processes in pool.py run rewards that compute. The process in async_pool.py runs rewards that wait for an endpoint.
compose.py combines the outcomes of several rewards into one score.
"""

import hashlib
import json
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TypeVar

from rewards.endpoint import EndpointSpec
from rewards.running.async_pool import AsyncPool, EndpointAway, Outage
from rewards.running.compose import Part, PartBuilder, PendingScore, TaskRewards, row_score
from rewards.running.pool import ComputePool, Job, Outcome
from rewards.running.worker import WorkerSetup
from rl import config
from rl.types import Prompt, Rollout, RowScore, Scored

__all__ = ["EndpointAway", "Outage", "RewardRunner", "Scoring"]

Result = TypeVar("Result")
# Judgements are stored, so that a judge gets each question only once.
REMEMBERED = 100_000  # maximum number of stored judgements


class RewardRunner:
    """Scores rollouts with the rewards of their task, in processes that can be killed.

    tasks       name of a task -> its rewards. `use` and `params` of a reward are arguments of `rewards.get`.
                `timeout_s` is the wall-clock time limit in seconds for one sample. It starts when the reward has been
                loaded. A group of n rollouts gets n times this limit. The wait for a free slot at an endpoint does not
                count. `memory_mb` is the number of MiB that scoring may use in addition to the memory in use after
                loading
    endpoints   name -> the server of a judge
    base_dir    the folder that `file.py:Name` is relative to
    workers     number of processes for rewards that compute
    setup_s     time limit in seconds for importing a reward and its `setup()`
    row_judges  name -> a judge of data rows (rewards.row_judge), for submit_row

    A task's reward is the sum of weight * value over the rewards of the task. Before the sum, penalties lower each
    value towards the lowest value of its reward (see rewards.penalty). Raises ValueError, before any process is
    started, for a reward, parameter or endpoint that does not exist. A sample is invalid if one of its rewards or
    penalties raises an exception, returns no number, runs out of time or memory, or if its process dies. Its score then
    contains the reason. But if the reward declares on_timeout="lowest", a sample that runs out of time or memory gets
    the lowest value (for a penalty: an offence of 1). Other samples are not affected.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[config.RewardSpec]],
        base_dir: str | Path = ".",
        workers: int = 2,
        endpoints: Mapping[str, EndpointSpec] | None = None,
        setup_s: float = 300.0,
        row_judges: Mapping[str, config.ScorerSpec] = MappingProxyType({}),
    ):
        if workers < 1:
            raise ValueError(f"the number of reward workers is {workers}; at least 1 is needed")
        self.on_outage: Callable[[Outage], None] = lambda outage: None  # called in the thread that waits for scores
        folder = Path(base_dir).resolve()
        self._endpoints = dict(endpoints or {})
        builder = PartBuilder(folder, self._endpoints)
        self._tasks = {task: builder.task(task, specs) for task, specs in tasks.items()}
        self._row_judges = {name: builder.row_judge(name, spec) for name, spec in row_judges.items()}
        self._parts = [part for task in self._tasks.values() for part in task.parts] + [*self._row_judges.values()]
        asynchronous = {part.scorer for part in self._parts if part.bound.reward.asynchronous}
        waiting = {name: setup for name, setup in builder.scorers.items() if name in asynchronous}
        computing = {name: setup for name, setup in builder.scorers.items() if name not in asynchronous}
        self._compute_pool = ComputePool(WorkerSetup(computing, folder, self._endpoints), workers, setup_s)
        self._async_pool = AsyncPool(WorkerSetup(waiting, folder, self._endpoints), setup_s)
        self._remembered: OrderedDict[bytes, Future[list[Outcome]]] = OrderedDict()
        self._lock = threading.Lock()

    def lowest(self, task: str) -> float:
        """Returns the lowest possible reward of this task."""
        return self._task(task).bound("lowest")

    def highest(self, task: str) -> float:
        """Returns the reward that a fully right response gets in this task."""
        return self._task(task).bound("highest")

    def is_group(self, task: str) -> bool:
        """True if one of the task's rewards needs all rollouts of a prompt at once."""
        return self._task(task).group

    def endpoint_names(self) -> set[str]:
        """Returns the names of the endpoints that the rewards and row judges ask."""
        return {name for part in self._parts for name in part.bound.endpoints}

    def versions(self) -> dict[str, dict[str, str]]:
        """Returns task -> reward or penalty -> a digest of its code and parameters."""
        return {task: {part.name: part.bound.version for part in one.parts} for task, one in self._tasks.items()}

    def penalties(self) -> frozenset[str]:
        """Returns the names of all penalties. These names are keys of `Scored.parts`."""
        return frozenset(part.name for part in self._parts if part.bound.reward.kind == "penalty")

    def problem(self, prompt: Prompt) -> str | None:
        """Returns the reason why a row cannot be scored (no reward for its task, or a missing field), else None."""
        if prompt.task not in self._tasks:
            return self._no_reward(prompt.task)
        for part in self._tasks[prompt.task].parts:
            needed = part.bound.reward.needs
            if needed and getattr(prompt, needed) is None:
                return f"row {prompt.id!r} has no {needed}, which {part.name} (task {prompt.task}) needs"
        return None

    def url(self, endpoint: str) -> str:
        """Returns an endpoint's URL, or "" if the run serves the model itself and has not started the server yet."""
        return self._endpoints[endpoint].url

    def set_urls(self, urls: Mapping[str, str], key_env: str) -> None:
        """Sets the URLs of endpoints that the run serves itself, and the name of the environment variable that contains
        their key. Call it before start()."""
        for name, url in urls.items():
            self._endpoints[name] = replace(self._endpoints[name], url=url, api_key_env=key_env)

    def start(self) -> Future[float]:
        """Starts the processes, which load every reward in the background.

        The future gets the seconds that loading took, or RuntimeError if a reward's setup failed.
        """
        both: Future[float] = Future()
        pools = [self._compute_pool.start(), self._async_pool.start()]

        def on_started(_: Future[float]) -> None:
            with self._lock:
                if not all(future.done() for future in pools) or both.done():
                    return
                failures = [error for future in pools if (error := future.exception())]
                if failures:
                    both.set_exception(failures[0])
                else:
                    both.set_result(max(future.result() for future in pools))

        for future in pools:
            future.add_done_callback(on_started)
        return both

    def submit(self, rollout: Rollout) -> Future[Scored]:
        """Scores one rollout when a process is free. If the task has a group reward, use submit_group instead."""
        task = rollout.prompt.task
        if self.is_group(task):
            raise ValueError(f"a reward of task {task!r} scores all rollouts of a prompt: use submit_group")
        return self.submit_group([rollout])[0]

    def submit_group(self, rollouts: Sequence[Rollout]) -> list[Future[Scored]]:
        """Scores all rollouts of one prompt. Group rewards score them together, other rewards score them one by one.

        Returns the futures in the order of the rollouts. A rollout that is unusable is invalid, and with a group reward
        the whole group.
        """
        if why := next((rollout.unusable for rollout in rollouts if rollout.unusable), ""):
            if self.is_group(rollouts[0].prompt.task):
                return [_done(Scored(rollout, 0.0, why)) for rollout in rollouts]
            return [
                _done(Scored(rollout, 0.0, rollout.unusable)) if rollout.unusable else self.submit(rollout)
                for rollout in rollouts
            ]
        task = self._task(rollouts[0].prompt.task)
        pending = [PendingScore(task, rollout) for rollout in rollouts]
        for index, part in enumerate(task.parts):
            members = pending if part.bound.reward.group else [one for one in pending if not one.truncated]
            batches = [members] if part.bound.reward.group else [[one] for one in members]
            for batch in batches:
                if any(not one.truncated for one in batch):
                    self._submit_part(part, index, batch)
        return [one.future for one in pending]

    def submit_row(self, prompt: Prompt, judge: str) -> Future[RowScore]:
        """Scores a data row with one of `row_judges` when a process is free."""
        part = self._row_judges[judge]
        score: Future[RowScore] = Future()

        def on_outcome(finished: Future[list[Outcome]]) -> None:
            if finished.cancelled():
                score.cancel()
            elif error := finished.exception():
                score.set_exception(error)
            else:
                score.set_result(row_score(part, finished.result()[0]))

        self._outcomes(part, [prompt]).add_done_callback(on_outcome)
        return score

    def begin(self, per_prompt: int) -> "Scoring":
        """Returns a Scoring for a batch that is still being sampled. Each prompt has `per_prompt` rollouts."""
        return Scoring(self, per_prompt)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Scores all rollouts, waits, and returns the scores in the same order. Rollouts with the same task and
        prompt id form a group."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault((rollout.prompt.task, rollout.prompt.id), []).append(i)
        futures: dict[int, Future[Scored]] = {}
        for members in groups.values():
            submitted = self.submit_group([rollouts[i] for i in members])
            futures.update(zip(members, submitted, strict=True))
        return self.results([futures[i] for i in range(len(rollouts))])

    def results(self, futures: Sequence[Future[Result]]) -> list[Result]:
        """Waits for all futures and returns the results. Meanwhile, calls `on_outage` for each outage. Raises
        EndpointAway if an endpoint did not answer for longer than its `max_wait`."""
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.2)
            with suppress(queue.Empty):  # several threads may wait; each outage goes to only one of them
                while True:
                    self.on_outage(self._async_pool.outages.get_nowait())
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends all processes, even in the middle of a sample. Cancels unfinished samples."""
        self._compute_pool.close()
        self._async_pool.close()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_part(self, part: Part, index: int, batch: Sequence[PendingScore]) -> None:
        """Scores a batch with part number `index` of the task. Adds the outcome of each rollout to the rollout's
        pending score."""

        def on_outcomes(finished: Future[list[Outcome]]) -> None:
            for place, one in enumerate(batch):
                one.add(index, finished, place)

        self._outcomes(part, [one.rollout for one in batch]).add_done_callback(on_outcomes)

    def _outcomes(self, part: Part, items: Sequence[Rollout | Prompt]) -> Future[list[Outcome]]:
        """Scores the items with the part. The returned future gets the outcomes. In a run, a judge gets the same
        question only once."""
        if not part.bound.reward.asynchronous or part.bound.reward.group:
            return self._queue_job(part, items)
        key = _question_digest(part, items[0])
        with self._lock:
            known = self._remembered.get(key)
            if known and not (known.done() and not _has_value(known)):
                self._remembered.move_to_end(key)
                return known
        outcomes = self._queue_job(part, items)
        with self._lock:
            self._remembered[key] = outcomes
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        outcomes.add_done_callback(partial(self._remember, key))
        return outcomes

    def _remember(self, key: bytes, finished: Future[list[Outcome]]) -> None:
        """Replaces a future that is done by one that only has the outcomes. A future that is done still holds its
        callbacks, and so the rollouts that it was made for, with their pictures."""
        with self._lock:
            if self._remembered.get(key) is finished and _has_value(finished):
                self._remembered[key] = Future()
                self._remembered[key].set_result(finished.result())

    def _queue_job(self, part: Part, items: Sequence[Rollout | Prompt]) -> Future[list[Outcome]]:
        reward = part.bound.reward
        job = Job(part.scorer, items, part.timeout_s * len(items), reward.on_timeout == "lowest")
        (self._async_pool if reward.asynchronous else self._compute_pool).put(job)
        return job.outcomes

    def _task(self, task: str) -> TaskRewards:
        if task not in self._tasks:
            raise ValueError(self._no_reward(task))
        return self._tasks[task]

    def _no_reward(self, task: str) -> str:
        known = ", ".join(self._tasks) or "no task"
        return f"task {task!r} has no reward; the recipe has rewards for {known}"


class Scoring:
    """The scores of a batch. Rollouts are added as soon as they are sampled, in any order."""

    def __init__(self, runner: RewardRunner, per_prompt: int):
        self._runner, self._per_prompt = runner, per_prompt
        self._futures: dict[int, Future[Scored]] = {}
        self._incomplete: dict[int, dict[int, Rollout]] = {}  # for group rewards: prompt -> its rollouts so far

    def add(self, place: int, rollout: Rollout) -> None:
        """Scores a rollout. `place` is the rollout's index in the batch. In the batch, the rollouts of a prompt are
        next to each other. If the task has a group reward, the rollouts of a prompt are scored when all of them are
        added."""
        if not self._runner.is_group(rollout.prompt.task):
            self._futures[place] = self._runner.submit(rollout)
            return
        group = self._incomplete.setdefault(place // self._per_prompt, {})
        group[place] = rollout
        if len(group) == self._per_prompt:
            places = sorted(group)
            submitted = self._runner.submit_group([group[one] for one in places])
            self._futures.update(zip(places, submitted, strict=True))
            del self._incomplete[place // self._per_prompt]

    def results(self) -> list[Scored]:
        """Waits for all scores and returns them in the order of their places."""
        if self._incomplete:
            raise ValueError(
                f"{len(self._incomplete)} prompts do not have all of their {self._per_prompt} rollouts yet"
            )
        return self._runner.results([self._futures[place] for place in sorted(self._futures)])


def _done(score: Scored) -> Future[Scored]:
    future: Future[Scored] = Future()
    future.set_result(score)
    return future


def _has_value(finished: Future[list[Outcome]]) -> bool:
    """True if the outcome has a value. An outcome without a value is not reused: the judge is asked again."""
    return not finished.cancelled() and not finished.exception() and "value" in finished.result()[0]


def _question_digest(part: Part, item: Rollout | Prompt) -> bytes:
    """Returns a digest of a question to a judge. It covers the scorer, the row without its id, and the response."""
    prompt, response = (item, None) if isinstance(item, Prompt) else (item.prompt, item.text)
    content = [prompt.task, prompt.messages, prompt.ground_truth, prompt.reference, prompt.meta, response]
    text = json.dumps([part.scorer, content, [p.digest for p in prompt.images]], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
