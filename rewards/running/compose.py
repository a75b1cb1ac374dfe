"""A task's rewards put together: from what the recipe says to parts, and from the parts' outcomes to one score."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewards.endpoint import EndpointSpec
from rewards.registry import BoundReward, Kind, get
from rewards.running.pool import Outcome
from rewards.running.worker import Unit
from rl import config
from rl.types import Rollout, RowScore, Scored

BELONGS: Mapping[Kind, str] = {
    "reward": "belongs under rewards",
    "penalty": "belongs under penalties",
    "row judge": "scores data rows, not responses; only curation uses it",
}


@dataclass(frozen=True, eq=False)
class Part:
    """A reward or penalty of a task: what scores it, and what it is called in metrics."""

    name: str
    unit: str
    bound: BoundReward
    timeout_s: float
    factor: float  # a reward's weight, a penalty's magnitude
    penalties: tuple["Part", ...] = ()

    @property
    def everything(self) -> tuple["Part", ...]:
        return (self, *self.penalties)


@dataclass(frozen=True)
class Task:
    """All of a task's rewards."""

    rewards: tuple[Part, ...]

    @property
    def parts(self) -> list[Part]:
        return [part for reward in self.rewards for part in reward.everything]

    @property
    def group(self) -> bool:
        """Whether any part wants all rollouts of a prompt at once."""
        return any(part.bound.reward.group for part in self.parts)

    def bound(self, edge: str) -> float:
        """The "lowest" or "highest" that the weighted sum can be."""
        other = {"lowest": "highest", "highest": "lowest"}[edge]
        return sum(r.factor * getattr(r.bound.reward, edge if r.factor >= 0 else other) for r in self.rewards)


class Builder:
    """Recipe to parts; equal rewards of several tasks become one unit, loaded once."""

    def __init__(self, folder: Path, endpoints: Mapping[str, EndpointSpec]):
        self.folder, self.endpoints = folder, endpoints
        self.units: dict[str, Unit] = {}

    def task(self, task: str, specs: Sequence[config.RewardSpec]) -> Task:
        taken: dict[str, int] = {}
        rewards = []
        for spec in specs:
            made = self._part(f"rewards.{task}", spec, "reward", spec.weight, taken)
            penalties = [self._part(f"rewards.{task}", one, "penalty", one.magnitude, taken) for one in spec.penalties]
            rewards.append(replace(made, penalties=tuple(penalties)))
        return Task(tuple(rewards))

    def row_judge(self, name: str, spec: config.ScorerSpec) -> Part:
        return self._part(f"row judge {name}", spec, "row judge", 1.0, {})

    def _part(self, place: str, spec: config.ScorerSpec, kind: Kind, factor: float, taken: dict[str, int]) -> Part:
        try:
            bound = get(spec.use, spec.params, self.folder, self.endpoints)
        except ValueError as e:
            raise ValueError(f"{place}: {e}") from e
        reward = bound.reward
        if reward.kind != kind:
            raise ValueError(f"{place}: {reward.name!r} is a {reward.kind} and {BELONGS[reward.kind]}")
        taken[reward.name] = taken.get(reward.name, 0) + 1
        name = reward.name if taken[reward.name] == 1 else f"{reward.name}_{taken[reward.name]}"
        timeout_s = reward.timeout_s if spec.timeout_s is None else spec.timeout_s
        return Part(name, self._unit(spec, reward.name), bound, timeout_s, factor)

    def _unit(self, spec: config.ScorerSpec, name: str) -> str:
        unit = Unit(spec.use, dict(spec.params), spec.memory_mb)
        for known, other in self.units.items():
            if other == unit:
                return known
        key = name if name not in self.units else f"{name}#{len(self.units)}"
        self.units[key] = unit
        return key


class Assembly:
    """A rollout whose parts are being scored; resolves its future when the last is there."""

    def __init__(self, task: Task, rollout: Rollout):
        self.task, self.rollout = task, rollout
        self.future: Future[Scored] = Future()
        self.truncated = rollout.finish == "length"  # earns the lowest value, whatever a group reward makes of it
        self._outcomes: dict[int, Outcome] = {}
        self._lock = threading.Lock()
        if self.truncated:
            self.future.set_result(Scored(rollout, task.bound("lowest"), details={"truncated": True}))

    def take(self, part: int, finished: Future[list[Outcome]], place: int) -> None:
        """One part's outcome, or why there is none."""
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
            self._outcomes[part] = finished.result()[place]
            last = len(self._outcomes) == len(self.task.parts) and not self.future.done()
        if last:
            self.future.set_result(self._scored())

    def _scored(self) -> Scored:
        outcomes = dict(zip(self.task.parts, (self._outcomes[i] for i in range(len(self._outcomes))), strict=True))
        return _sum(self.rollout, self.task, outcomes)


def row_score(judge: Part, outcome: Outcome) -> RowScore:
    """A row judge's outcome as its score."""
    value, details, why = _read(judge, outcome)
    invalid = f"row judge {judge.name}: {why}" if why else None
    return RowScore(value, invalid, details, outcome.get("seconds", 0.0))


def _sum(rollout: Rollout, task: Task, outcomes: Mapping[Part, Outcome]) -> Scored:
    total, values, details, invalid = 0.0, {}, {}, []
    for reward in task.rewards:
        lowest, kept = reward.bound.reward.lowest, 1.0
        for part in reward.everything:
            value, said, why = _read(part, outcomes[part])
            if why:
                invalid.append(f"{part.bound.reward.kind} {part.name}: {why}")
                continue
            values[part.name] = value
            if said:
                details[part.name] = said
            if part is not reward:
                kept *= 1 - part.factor * value
        total += reward.factor * (lowest + (values.get(reward.name, lowest) - lowest) * kept)
    seconds = sum(outcome.get("seconds", 0.0) for outcome in outcomes.values())
    if invalid:
        return Scored(rollout, task.bound("lowest"), "; ".join(invalid), values, details, seconds)
    if len(task.parts) == 1:
        details = next(iter(details.values()), {})
    return Scored(rollout, total, None, values, details, seconds)


def _read(part: Part, outcome: Outcome) -> tuple[float, Mapping[str, Any], str | None]:
    """Value, details, and why the sample is invalid, if it is."""
    reward = part.bound.reward
    if "exhausted" in outcome and reward.on_timeout == "lowest":
        return (reward.lowest if reward.kind == "reward" else 1.0), {"why": outcome["exhausted"]}, None
    if "value" not in outcome:
        return 0.0, {}, outcome.get("invalid") or outcome["exhausted"]
    return outcome["value"], outcome["details"], None
