"""One PPO iteration, every arrow of the flow in order.

prompts -> rollouts -> scores -> values -> targets -> critic and policy updates -> new weights in the engines
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from rl.config import Config
from rl.learner.batch import collate
from rl.learner.features import FeatureStore
from rl.learner.targets import make_targets
from rl.record.metrics import rollout_metrics
from rl.stop import Stop
from rl.types import Picture, Prompt, Rollout, Scored
from stages.ahead import Ahead

Finished = Callable[[int, Rollout], None]


class Sampler(Protocol):
    """rollout.pool.EnginePool, or a scripted one."""

    def sample(
        self, prompts: Sequence[Prompt], per_prompt: int, iteration: int, finished: Finished = ...
    ) -> list[Rollout]: ...
    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]: ...
    def greedy(self, prompts: Sequence[Prompt], finished: Finished = ...) -> list[Rollout]: ...
    def load(self, weights: Any, policy_step: int) -> None: ...
    def encodings(self) -> int: ...
    @property
    def policy_step(self) -> int: ...


class Scoring(Protocol):
    """A batch that is scored while its rollouts come in (rewards.running.runner.Scoring)."""

    def add(self, place: int, rollout: Rollout) -> None: ...
    def results(self) -> list[Scored]: ...


class Scorer(Protocol):
    """rewards.running.runner.RewardRunner, or a scripted one."""

    def begin(self, per_prompt: int) -> Scoring: ...


class Stage(Protocol):
    """What differs between RLVR, RLHF and PaCoRe."""

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """What the policy is asked in an iteration for these rows."""
        ...

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """What it is asked in an evaluation."""
        ...

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        """Numbers of the stage's own on an iteration's samples."""
        ...

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        """Numbers of the stage's own on held-out rows."""
        ...


class Remote(Protocol):
    """A learner or critic, answered from wherever it lives (rl.actors.Worker)."""

    def start(self, method: str, *args: Any) -> Any: ...
    def call(self, method: str, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Encodings:
    """Pictures that went through a vision tower so far."""

    learner: int = 0
    engines: int = 0


@dataclass
class Parts:
    """What an iteration works with."""

    config: Config
    sampler: Sampler
    scorer: Scorer
    policy: Remote
    critic: Remote
    features: FeatureStore
    stage: Stage
    phase: Callable[[str], Any] = lambda name: None  # told what is going on
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
    side_by_side: bool = False  # whether policy and critic have processors of their own
    meanwhile: Callable[[], None] = lambda: None  # called now and then while samples of another thread are waited for
    gap: float = float("nan")  # at the last weight sync
    encodings: Encodings = Encodings()  # up to the last weight sync, when the engines could be asked
    told: Encodings = Encodings()  # those that metrics have had
    ahead: Ahead["Samples"] = field(default_factory=Ahead)

    def new_encodings(self) -> dict[str, float]:
        """Those that no metrics have had yet, as metrics."""
        now, before, self.told = self.encodings, self.told, self.encodings
        return {
            "time/learner_encodings": float(now.learner - before.learner),
            "time/engine_encodings": float(now.engines - before.engines),
        }


@dataclass
class Clock:
    """Seconds per phase of an iteration, as time/* metrics.

    Args:
        phase: told what begins.
        note: told what has ended: who, what, and its first and last moment in seconds since 1970.
        who: the thread that works through the phases.
    """

    phase: Callable[[str], Any]
    note: Callable[[str, str, float, float], None] | None = None
    who: str = "loop"
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.phase(name)
        moment, start = time.time(), time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        if self.note:
            self.note(self.who, name, moment, time.time())

    def beside(self, who: str) -> "Clock":
        """A clock for another thread, whose phases are not shown as what the run is doing."""
        return Clock(lambda name: None, self.note, who)

    def metrics(self) -> dict[str, float]:
        seconds = self.seconds | {"total": time.monotonic() - self.began}
        return {f"time/{name}": round(value, 4) for name, value in seconds.items()}


def ppo_iteration(
    iteration: int, prompts: Sequence[Prompt], following: Sequence[Prompt], parts: Parts, clock: Clock
) -> tuple[dict[str, float], list[Scored]]:
    """Sample, score, learn, hand on the weights. Returns the iteration's metrics and its samples.

    Until the first update it can be broken off without losing anything, which `parts.interruptible` marks. With
    `rollout.max_staleness: 1` the samples were made while the iteration before was training, by the weights from
    before that; those of the next one, of the prompts `following`, are begun here, once the engines have the newest.
    """
    config = parts.config
    stats: dict[str, float] = {}
    with parts.interruptible():
        samples = _taken(iteration, prompts, parts, clock)
        if config.rollout.max_staleness:
            with clock("sync"):
                stats |= catch_up(iteration - 1, prompts, parts)
            if following:
                beside = clock.beside("samples ahead")
                parts.ahead.start(iteration + 1, lambda: collect(iteration + 1, following, parts, beside))
    try:
        stats |= learn(iteration, samples, parts, clock)
    except FloatingPointError as error:
        raise Diverged(str(error), samples.scored) from error
    if not config.rollout.max_staleness:
        with clock("sync"):
            stats |= catch_up(iteration, prompts, parts)
    tokens = sum(len(s.rollout.response_ids) for s in samples.scored)
    stats["rollout/tokens_per_second"] = tokens / samples.seconds
    lag = sum((iteration - 1 - step) * n for s in samples.scored for step, n in s.rollout.steps)
    stats["rollout/staleness"] = lag / tokens
    if config.rollout.partial:
        continued = sum(len(s.rollout.pieces) > 1 for s in samples.scored)
        stats["response/continued_fraction"] = continued / len(samples.scored)
    stats |= parts.stage.metrics(samples.scored)
    return rollout_metrics(samples.scored, config.rollouts_per_prompt) | stats, samples.scored


def _taken(iteration: int, prompts: Sequence[Prompt], parts: Parts, clock: Clock) -> "Samples":
    """Samples that were begun an iteration ago, or that are made now."""
    if not parts.ahead.has(iteration):
        return collect(iteration, prompts, parts, clock)
    with clock("rollout"):
        return parts.ahead.take(iteration, parts.meanwhile)


class Diverged(RuntimeError):
    """Gradients were not finite, again and again."""

    def __init__(self, message: str, scored: Sequence[Scored]) -> None:
        super().__init__(message)
        self.scored = scored  # the samples that they came from


@dataclass(frozen=True)
class Samples:
    """An iteration's rollouts with their rewards."""

    scored: list[Scored]
    seconds: float  # that generating them took


def collect(iteration: int, prompts: Sequence[Prompt], parts: Parts, clock: Clock) -> Samples:
    """Roll out and score, each rollout as soon as it is there."""
    config = parts.config
    scoring = parts.scorer.begin(config.rollouts_per_prompt)

    def finished(place: int, rollout: Rollout) -> None:
        parts.ahead.check()
        scoring.add(place, rollout)

    with clock("rollout"):
        parts.sampler.sample(
            parts.stage.prompts_for_iteration(prompts, iteration), config.rollouts_per_prompt, iteration, finished
        )
    with clock("reward"):
        scored = enough_valid(scoring.results(), config.max_invalid_fraction)
    return Samples(scored, clock.seconds["rollout"])


def learn(iteration: int, samples: Samples, parts: Parts, clock: Clock) -> dict[str, float]:
    """Values, targets, and both updates; side by side where policy and critic do not take each other's processors."""
    config, policy, critic = parts.config, parts.policy, parts.critic
    batch = collate(samples.scored)
    features = parts.features.of(pictures(s.rollout for s in samples.scored))
    with clock("critic"):
        values, final = critic.call("values", batch, features)
        targets = make_targets(batch, values, final, config.ppo)
        critic_update = critic.start("update", batch, targets, features, iteration)
        if not parts.side_by_side:
            critic_update.result()
    stats: dict[str, float] = {}
    if iteration > config.ppo.critic_only_iterations:
        with clock("policy"):
            stats |= policy.call("update", batch, targets, features, iteration)
    with clock("critic"):
        stats |= critic_update.result()
    parts.features.trim(features)
    return stats


def pictures(rollouts: Iterable[Rollout]) -> list[Picture]:
    """Those that their prompts show, each once."""
    return list({picture.digest: picture for r in rollouts for picture in r.prompt.images}.values())


def enough_valid(scored: list[Scored], limit: float) -> list[Scored]:
    """`scored`, unless more than the share `limit` of it is invalid.

    Raises: Stop with the most frequent reasons.
    """
    reasons = Counter(s.invalid for s in scored if s.invalid is not None)
    if reasons.total() <= limit * len(scored):
        return scored
    listed = "".join(f"\n  {count} x {why}" for why, count in reasons.most_common(5))
    raise Stop(
        f"{reasons.total()} of {len(scored)} samples are invalid, which is more than max_invalid_fraction = {limit:g} "
        f"allows: something around the model fails, and what is left would teach the wrong thing.{listed}",
        saves=True,
    )


def catch_up(iteration: int, prompts: Sequence[Prompt], parts: Parts) -> dict[str, float]:
    """`sync`, if the engines' weights are older than those from after `iteration`, else the gap found at the last."""
    parts.ahead.settle(parts.meanwhile)
    if parts.sampler.policy_step < iteration:
        return sync(iteration, prompts, parts)
    return {"rollout/logprob_gap": parts.gap}


def sync(iteration: int, prompts: Sequence[Prompt], parts: Parts) -> dict[str, float]:
    """Bring the policy's weights into the engines and check that both then say the same.

    A few of `prompts` are sampled once more, and the engine's logprobs compared with the learner's.
    Raises: Stop if the mean gap is over `rollout.logprob_gap_limit`.
    """
    parts.sampler.load(parts.policy.start("weights"), iteration)
    limit = parts.config.rollout.logprob_gap_limit
    fresh = parts.sampler.check(prompts[: parts.config.rollout.logprob_check], iteration)
    gap = parts.policy.call("logprob_gap", fresh, parts.features.of(pictures(fresh)))
    parts.features.trim()
    if not gap <= limit:
        raise Stop(
            f"after the weight sync of iteration {iteration} engine and learner differ by {gap:.4f} nats per token "
            f"(rollout.logprob_gap_limit is {limit}). The engine does not run the learner's weights, or computes in "
            "another precision; PPO would learn from wrong ratios, so the run stops here.",
            saves=False,
        )
    parts.gap = gap
    parts.encodings = Encodings(parts.features.forwards, parts.sampler.encodings())
    return {"rollout/logprob_gap": gap}


def evaluate(prompts: Sequence[Prompt], parts: Parts) -> dict[str, float]:
    """Mean greedy reward per task over held-out prompts, as eval/<task>, and what the stage makes of them. Invalid
    samples are left out."""
    rewards: dict[str, list[float]] = {}
    every: list[Scored] = []
    size = parts.config.eval.batch
    for start in range(0, len(prompts), size):
        scoring = parts.scorer.begin(1)
        parts.sampler.greedy(parts.stage.held_out(prompts[start : start + size]), scoring.add)
        every += enough_valid(scoring.results(), parts.config.max_invalid_fraction)
    for s in every:
        if s.invalid is None:
            rewards.setdefault(s.rollout.prompt.task, []).append(s.reward)
    means = {f"eval/{task}": sum(values) / len(values) for task, values in sorted(rewards.items())}
    return means | dict(parts.stage.evaluation(every))
