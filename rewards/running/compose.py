"""Builds the parts of a task (rewards and penalties) from a recipe. Combines the outcomes of the parts into one
score."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rewards.endpoint import EndpointSpec
from rewards.registry import BoundReward, Kind, get
from rewards.running.pool import Outcome
from rewards.running.worker import ScorerSetup
from rl import config
from rl.types import Rollout, RowScore, Scored

BELONGS: Mapping[Kind, str] = {
    "reward": "belongs under rewards",
    "penalty": "belongs under penalties",
    "row judge": "scores data rows, not responses; only curation uses it",
}


@dataclass(frozen=True, eq=False)
class Part:
    """A reward or penalty of a task, or a row judge."""

    name: str  # name in metrics
    scorer: str  # key in PartBuilder.scorers
    bound: BoundReward
    timeout_s: float
    factor: float  # weight of a reward, or magnitude of a penalty
    penalties: tuple["Part", ...] = ()

    @property
    def with_penalties(self) -> tuple["Part", ...]:
        return (self, *self.penalties)


@dataclass(frozen=True)
class TaskRewards:
    """All rewards of a task, with their penalties."""

    rewards: tuple[Part, ...]

    @property
    def parts(self) -> list[Part]:
        return [part for reward in self.rewards for part in reward.with_penalties]

    @property
    def group(self) -> bool:
        """True if any part needs all rollouts of a prompt at once."""
        return any(part.bound.reward.group for part in self.parts)

    def bound(self, edge: Literal["lowest", "highest"]) -> float:
        """Returns the lowest possible reward of the task if `edge` is "lowest", else the highest possible reward. The
        reward of a task is a weighted sum."""
        other = {"lowest": "highest", "highest": "lowest"}[edge]
        return sum(r.factor * getattr(r.bound.reward, edge if r.factor >= 0 else other) for r in self.rewards)


class PartBuilder:
    """Builds parts from a recipe. Equal rewards of several tasks share one scorer, which is loaded once."""

    def __init__(self, folder: Path, endpoints: Mapping[str, EndpointSpec]):
        self.folder, self.endpoints = folder, endpoints
        self.scorers: dict[str, ScorerSetup] = {}

    def task(self, task: str, specs: Sequence[config.RewardSpec]) -> TaskRewards:
        place, counts = f"rewards.{task}", dict[str, int]()
        rewards = []
        for spec in specs:
            reward = self._part(place, spec, "reward", spec.weight, counts)
            penalties = [self._part(place, one, "penalty", one.magnitude, counts) for one in spec.penalties]
            rewards.append(replace(reward, penalties=tuple(penalties)))
        return TaskRewards(tuple(rewards))

    def row_judge(self, name: str, spec: config.ScorerSpec) -> Part:
        return self._part(f"row judge {name}", spec, "row judge", 1.0, {})

    def _part(self, place: str, spec: config.ScorerSpec, kind: Kind, factor: float, counts: dict[str, int]) -> Part:
        """Builds a part. `counts` maps each reward's name to its number of uses in the task so far, so that the second
        `exact` is called `exact_2`."""
        try:
            bound = get(spec.use, spec.params, self.folder, self.endpoints)
        except ValueError as e:
            raise ValueError(f"{place}: {e}") from e
        reward = bound.reward
        if reward.kind != kind:
            raise ValueError(f"{place}: {reward.name!r} is a {reward.kind} and {BELONGS[reward.kind]}")
        counts[reward.name] = counts.get(reward.name, 0) + 1
        name = reward.name if counts[reward.name] == 1 else f"{reward.name}_{counts[reward.name]}"
        timeout_s = reward.timeout_s if spec.timeout_s is None else spec.timeout_s
        return Part(name, self._scorer(spec, reward.name), bound, timeout_s, factor)

    def _scorer(self, spec: config.ScorerSpec, name: str) -> str:
        setup = ScorerSetup(spec.use, dict(spec.params), spec.memory_mb)
        for known, other in self.scorers.items():
            if other == setup:
                return known
        key = name if name not in self.scorers else f"{name}#{len(self.scorers)}"
        self.scorers[key] = setup
        return key


class PendingScore:
    """A rollout that is being scored. Its future gets the result when the outcome of the last part is added."""

    def __init__(self, task: TaskRewards, rollout: Rollout):
        self.task, self.rollout = task, rollout
        self.future: Future[Scored] = Future()
        # A truncated rollout gets the lowest value, even if a group reward returns more.
        self.truncated = rollout.finish == "length"
        self._outcomes: dict[int, Outcome] = {}
        self._lock = threading.Lock()
        if self.truncated:
            self.future.set_result(Scored(rollout, task.bound("lowest"), details={"truncated": True}))

    def add(self, part: int, finished: Future[list[Outcome]], index: int) -> None:
        """Adds the outcome of part number `part`. The outcome is item `index` of the result of `finished`. If
        `finished` has failed or was cancelled, the future of this rollout fails or is cancelled too."""
        if self.future.done():
            return
        if finished.cancelled():
            self.future.cancel()
            return
        if error := finished.exception():
            with self._lock:
                if not self.future.done():
                    self.future.set_exception(error)
            return
        with self._lock:
            self._outcomes[part] = finished.result()[index]
            last = len(self._outcomes) == len(self.task.parts) and not self.future.done()
        if last:
            self.future.set_result(self._scored())

    def _scored(self) -> Scored:
        outcomes = dict(zip(self.task.parts, (self._outcomes[i] for i in range(len(self._outcomes))), strict=True))
        return _sum(self.rollout, self.task, outcomes)


def row_score(judge: Part, outcome: Outcome) -> RowScore:
    """Converts the outcome of a row judge into a RowScore."""
    value, details, why = _value_of(judge, outcome)
    invalid = f"row judge {judge.name}: {why}" if why else None
    return RowScore(value, invalid, details, outcome.get("seconds", 0.0))


def _sum(rollout: Rollout, task: TaskRewards, outcomes: Mapping[Part, Outcome]) -> Scored:
    total, values, details, invalid = 0.0, {}, {}, []
    for reward in task.rewards:
        lowest, kept = reward.bound.reward.lowest, 1.0
        for part in reward.with_penalties:
            value, part_details, why = _value_of(part, outcomes[part])
            if why:
                invalid.append(f"{part.bound.reward.kind} {part.name}: {why}")
                continue
            values[part.name] = value
            if part_details:
                details[part.name] = part_details
            if part is not reward:
                kept *= 1 - part.factor * value
        total += reward.factor * (lowest + (values.get(reward.name, lowest) - lowest) * kept)
    seconds = sum(outcome.get("seconds", 0.0) for outcome in outcomes.values())
    if invalid:
        return Scored(rollout, task.bound("lowest"), "; ".join(invalid), values, details, seconds)
    if len(task.parts) == 1:
        details = next(iter(details.values()), {})
    return Scored(rollout, total, None, values, details, seconds)


def _value_of(part: Part, outcome: Outcome) -> tuple[float, Mapping[str, Any], str | None]:
    """Returns the value, the details, and the reason why the outcome is invalid (None if it is valid)."""
    reward = part.bound.reward
    if "exhausted" in outcome and reward.on_timeout == "lowest":
        return (reward.lowest if reward.kind == "reward" else 1.0), {"why": outcome["exhausted"]}, None
    if "value" not in outcome:
        return 0.0, {}, outcome.get("invalid") or outcome["exhausted"]
    return outcome["value"], outcome["details"], None
