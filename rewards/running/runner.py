"""Runs a recipe's rewards: Rollout in, Scored out, and nothing that a reward does hurts the run.

What computes goes to pool.py, what waits for an endpoint to async_pool.py; compose.py makes one score of their
outcomes.
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
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TypeVar

from rewards.endpoint import EndpointSpec
from rewards.running.async_pool import AsyncPool, EndpointAway, Outage
from rewards.running.compose import Assembly, Builder, Part, Task, row_score
from rewards.running.pool import Job, Outcome, WorkerPool
from rewards.running.worker import Orders
from rl import config
from rl.types import Prompt, Rollout, RowScore, Scored

__all__ = ["EndpointAway", "Outage", "RewardRunner", "Scoring"]

Result = TypeVar("Result")
REMEMBERED = 100_000  # judgements kept, so that the same question about the same response is asked once


class RewardRunner:
    """Scores rollouts with the rewards of their task, in processes that can be killed.

    tasks       task -> its rewards. `use` and `params` as `rewards.get` takes them; `timeout_s`, wall-clock
                seconds for scoring one sample (a group gets that times its size; waiting for a free slot at an
                endpoint does not count), from when the reward is loaded; `memory_mb`, MiB that scoring may take on
                top of what loading took
    endpoints   the judges' servers by name, of which rewards ask
    base_dir    the folder `file.py:Name` is relative to
    workers     processes for rewards that compute
    setup_s     seconds that importing a reward and its `setup()` may take
    row_judges  name -> a judge of data rows (rewards.row_judge), for submit_row

    A task's reward is the sum of weight * value over its rewards, each value first taken towards its lowest by its
    penalties (rewards.penalty). Raises ValueError, before any process is started, for a reward, parameter or endpoint
    that does not exist. A sample one of whose rewards or penalties raises, dies or returns no number comes back
    invalid, with the reason; so does one that ran out of time or memory, unless the reward declares
    on_timeout="lowest" (for a penalty: a full offence). Other samples never notice.
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
            raise ValueError(f"{workers} reward workers; at least 1 is needed")
        self.on_outage: Callable[[Outage], None] = lambda outage: None  # called in the thread that waits for scores
        folder = Path(base_dir).resolve()
        self._endpoints = dict(endpoints or {})
        builder = Builder(folder, self._endpoints)
        self._tasks = {task: builder.task(task, specs) for task, specs in tasks.items()}
        self._row_judges = {name: builder.row_judge(name, spec) for name, spec in row_judges.items()}
        self._parts = [part for task in self._tasks.values() for part in task.parts] + [*self._row_judges.values()]
        waits = {part.unit for part in self._parts if part.bound.reward.asynchronous}
        waiting = {unit: found for unit, found in builder.units.items() if unit in waits}
        computing = {unit: found for unit, found in builder.units.items() if unit not in waits}
        self._pool = WorkerPool(Orders(computing, folder, self._endpoints), workers, setup_s)
        self._async = AsyncPool(Orders(waiting, folder, self._endpoints), setup_s)
        self._remembered: OrderedDict[bytes, Future[list[Outcome]]] = OrderedDict()
        self._lock = threading.Lock()

    def lowest(self, task: str) -> float:
        """The least this task's reward can be."""
        return self._task(task).bound("lowest")

    def highest(self, task: str) -> float:
        """What a fully right response to this task gets."""
        return self._task(task).bound("highest")

    def is_group(self, task: str) -> bool:
        """Whether one of the task's rewards wants all rollouts of a prompt at once."""
        return self._task(task).group

    def asks(self) -> set[str]:
        """The endpoints that the rewards of this recipe ask."""
        return {name for part in self._parts for name in part.bound.endpoints}

    def penalties(self) -> frozenset[str]:
        """Names of all penalties, as in `Scored.parts`."""
        return frozenset(part.name for part in self._parts if part.bound.reward.kind == "penalty")

    def problem(self, prompt: Prompt) -> str | None:
        """Why a row does not fit its reward, if it does not: its task has none, or it lacks what that needs."""
        if prompt.task not in self._tasks:
            return self._no_reward(prompt.task)
        for part in self._tasks[prompt.task].parts:
            needed = part.bound.reward.needs
            if needed and getattr(prompt, needed) is None:
                return f"row {prompt.id!r} has no {needed}, which {part.name} (task {prompt.task}) compares with"
        return None

    def address(self, endpoint: str) -> str:
        """Where an endpoint is; "" while the run has not started the server."""
        return self._endpoints[endpoint].url

    def served(self, urls: Mapping[str, str]) -> None:
        """Where endpoints are that the run serves itself; to be told before anything is started."""
        for name, url in urls.items():
            self._endpoints[name] = replace(self._endpoints[name], url=url)

    def warm(self) -> Future[float]:
        """Starts the processes and loads every reward in each, without waiting for it.

        The future holds the seconds that took, or RuntimeError if a reward's setup failed.
        """
        both: Future[float] = Future()
        left = [self._pool.warm(), self._async.warm()]

        def one_is_there(_: Future[float]) -> None:
            with self._lock:
                if not all(future.done() for future in left) or both.done():
                    return
                failures = [error for future in left if (error := future.exception())]
                if failures:
                    both.set_exception(failures[0])
                else:
                    both.set_result(max(future.result() for future in left))

        for future in left:
            future.add_done_callback(one_is_there)
        return both

    def submit(self, rollout: Rollout) -> Future[Scored]:
        """Scores one rollout as soon as a process is free. Group rewards take submit_group."""
        task = rollout.prompt.task
        if self.is_group(task):
            raise ValueError(f"a reward of task {task!r} scores all rollouts of a prompt: use submit_group")
        return self.submit_group([rollout])[0]

    def submit_group(self, rollouts: Sequence[Rollout]) -> list[Future[Scored]]:
        """Scores all rollouts of one prompt, in order: group rewards together, others each by itself."""
        task = self._task(rollouts[0].prompt.task)
        made = [Assembly(task, rollout) for rollout in rollouts]
        for index, part in enumerate(task.parts):
            members = made if part.bound.reward.group else [one for one in made if not one.truncated]
            batches = [members] if part.bound.reward.group else [[one] for one in members]
            for batch in batches:
                if any(not one.truncated for one in batch):
                    self._put(part, index, batch)
        return [one.future for one in made]

    def submit_row(self, prompt: Prompt, judge: str) -> Future[RowScore]:
        """Has one of `row_judges` score a data row as soon as a process is free."""
        part = self._row_judges[judge]
        score: Future[RowScore] = Future()

        def settle(finished: Future[list[Outcome]]) -> None:
            if finished.cancelled():
                score.cancel()
            elif error := finished.exception():
                score.set_exception(error)
            else:
                score.set_result(row_score(part, finished.result()[0]))

        self._outcomes(part, [prompt]).add_done_callback(settle)
        return score

    def begin(self, per_prompt: int) -> "Scoring":
        """Scores a batch of `per_prompt` rollouts per prompt while it is still being sampled."""
        return Scoring(self, per_prompt)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Scores all of these and waits; the result has their order. A group is what shares a prompt id."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault((rollout.prompt.task, rollout.prompt.id), []).append(i)
        futures: dict[int, Future[Scored]] = {}
        for members in groups.values():
            submitted = self.submit_group([rollouts[i] for i in members])
            futures.update(zip(members, submitted, strict=True))
        return self.results([futures[i] for i in range(len(rollouts))])

    def results(self, futures: Sequence[Future[Result]]) -> list[Result]:
        """Waits for all; calls `on_outage` meanwhile. Raises EndpointAway."""
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.2)
            with suppress(queue.Empty):  # several threads may wait, and only one hears of each
                while True:
                    self.on_outage(self._async.news.get_nowait())
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends all processes, also those in the middle of a sample; what is unfinished is cancelled."""
        self._pool.close()
        self._async.close()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, part: Part, index: int, batch: Sequence["Assembly"]) -> None:
        """Has `part` score a batch, and gives each of it its outcome."""

        def settle(finished: Future[list[Outcome]]) -> None:
            for place, one in enumerate(batch):
                one.take(index, finished, place)

        self._outcomes(part, [one.rollout for one in batch]).add_done_callback(settle)

    def _outcomes(self, part: Part, rollouts: Sequence[Rollout | Prompt]) -> Future[list[Outcome]]:
        reward = part.bound.reward
        if reward.asynchronous and not reward.group:
            return self._judgement(part, rollouts[0])
        return self._start(part, rollouts)

    def _start(self, part: Part, rollouts: Sequence[Rollout | Prompt]) -> Future[list[Outcome]]:
        reward = part.bound.reward
        job = Job(part.unit, rollouts, part.timeout_s * len(rollouts), reward.on_timeout == "lowest")
        (self._async if reward.asynchronous else self._pool).put(job)
        return job.outcomes

    def _judgement(self, part: Part, rollout: Rollout | Prompt) -> Future[list[Outcome]]:
        """The outcome of an identical question asked before in this run, or under way; else a new one."""
        key = _question(part, rollout)
        with self._lock:
            known = self._remembered.get(key)
            if known and not (known.done() and not _is_judgement(known)):
                self._remembered.move_to_end(key)
                return known
        asked = self._start(part, [rollout])
        with self._lock:
            self._remembered[key] = asked
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return asked

    def _task(self, task: str) -> Task:
        if task not in self._tasks:
            raise ValueError(self._no_reward(task))
        return self._tasks[task]

    def _no_reward(self, task: str) -> str:
        known = ", ".join(self._tasks) or "no task"
        return f"task {task!r} has no reward; the recipe has rewards for {known}"


class Scoring:
    """The scores of a batch, begun as its rollouts come in, in any order."""

    def __init__(self, runner: RewardRunner, per_prompt: int):
        self._runner, self._per_prompt = runner, per_prompt
        self._futures: dict[int, Future[Scored]] = {}
        self._incomplete: dict[int, dict[int, Rollout]] = {}  # groups that a group reward waits for

    def add(self, place: int, rollout: Rollout) -> None:
        """`place` is the rollout's in the batch, in which the rollouts of a prompt are neighbours."""
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
        """Waits for all scores, in the order of their places."""
        if self._incomplete:
            raise ValueError(f"{len(self._incomplete)} prompts have not all of their {self._per_prompt} rollouts yet")
        return self._runner.results([self._futures[place] for place in sorted(self._futures)])


def _is_judgement(finished: Future[list[Outcome]]) -> bool:
    """Whether it is worth remembering: what went wrong is asked again."""
    return not finished.cancelled() and not finished.exception() and "value" in finished.result()[0]


def _question(part: Part, rollout: Rollout | Prompt) -> bytes:
    """A digest of what is asked about a rollout or a row: the content of the row, but not its id, and the response."""
    prompt, text = (rollout, None) if isinstance(rollout, Prompt) else (rollout.prompt, rollout.text)
    seen = [prompt.task, prompt.messages, prompt.ground_truth, prompt.reference, prompt.meta, text]
    question = json.dumps([part.unit, seen, [p.digest for p in prompt.images]], sort_keys=True, default=repr)
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()
