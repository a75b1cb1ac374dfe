"""One PPO iteration, every arrow of the flow in order.

prompts -> rollouts -> scores -> values -> targets -> critic and policy updates -> new weights in the engines
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from rl.config import Config
from rl.features import FeatureStore
from rl.metrics import rollout_metrics
from rl.packing import collate
from rl.stop import Stop
from rl.targets import make_targets
from rl.types import Picture, Prompt, Rollout, Scored

Finished = Callable[[int, Rollout], None]


class Sampler(Protocol):
    """rollout.pool.Pool, or a scripted one."""

    def sample(
        self, prompts: Sequence[Prompt], per_prompt: int, iteration: int, finished: Finished = ...
    ) -> list[Rollout]: ...
    def greedy(self, prompts: Sequence[Prompt], finished: Finished = ...) -> list[Rollout]: ...
    def load(self, weights: Any, policy_step: int) -> None: ...


class Scoring(Protocol):
    """A batch that is scored while its rollouts come in (rewards.runner.Scoring)."""

    def add(self, place: int, rollout: Rollout) -> None: ...
    def results(self) -> list[Scored]: ...


class Scorer(Protocol):
    """rewards.runner.RewardRunner, or a scripted one."""

    def begin(self, per_prompt: int) -> Scoring: ...


class Remote(Protocol):
    """A learner or critic, answered from wherever it lives (rl.actors.Worker)."""

    def start(self, method: str, *args: Any) -> Any: ...
    def call(self, method: str, *args: Any) -> Any: ...


@dataclass
class Parts:
    """What an iteration works with."""

    config: Config
    sampler: Sampler
    scorer: Scorer
    policy: Remote
    critic: Remote
    features: FeatureStore
    phase: Callable[[str], Any] = lambda name: None  # told what is going on
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Clock:
    """Seconds per phase of an iteration, as time/* metrics."""

    phase: Callable[[str], Any]
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.phase(name)
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        seconds = self.seconds | {"total": time.monotonic() - self.began}
        return {f"time/{name}": round(value, 4) for name, value in seconds.items()}


def ppo_iteration(
    iteration: int, prompts: Sequence[Prompt], parts: Parts, clock: Clock
) -> tuple[dict[str, float], list[Scored]]:
    """Sample, score, learn, hand on the weights. Returns the iteration's metrics and its samples.

    Until the first update it can be broken off without losing anything, which `parts.interruptible` marks.
    """
    config, policy, critic = parts.config, parts.policy, parts.critic
    with parts.interruptible():
        with clock("rollout"):
            scoring = parts.scorer.begin(config.rollouts_per_prompt)
            rollouts = parts.sampler.sample(prompts, config.rollouts_per_prompt, iteration, scoring.add)
        with clock("reward"):
            scored = enough_valid(scoring.results(), config.max_invalid_fraction)
    batch = collate(scored)
    with clock("critic"):
        features = parts.features.of(pictures(rollouts))
        values, final = critic.call("values", batch, features)
        targets = make_targets(batch, values, final, config.ppo)
        stats = critic.call("update", batch, targets, features, iteration)
    if iteration > config.ppo.critic_only_iterations:
        with clock("policy"):
            stats |= policy.call("update", batch, targets, features, iteration)
    with clock("sync"):
        stats |= sync(iteration, prompts, parts)
    tokens = sum(len(r.response_ids) for r in rollouts)
    stats["rollout/tokens_per_second"] = tokens / clock.seconds["rollout"]
    stats["rollout/staleness"] = 0.0  # strictly synchronous
    return rollout_metrics(scored, config.rollouts_per_prompt) | stats, scored


def pictures(rollouts: Sequence[Rollout]) -> list[Picture]:
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


def sync(iteration: int, prompts: Sequence[Prompt], parts: Parts) -> dict[str, float]:
    """Bring the policy's weights into the engines and check that both then say the same.

    A few of `prompts` are sampled once more, and the engine's logprobs compared with the learner's.
    Raises: Stop if the mean gap is over `rollout.logprob_gap_limit`.
    """
    parts.sampler.load(parts.policy.start("weights"), iteration)
    limit = parts.config.rollout.logprob_gap_limit
    fresh = parts.sampler.sample(prompts[: parts.config.rollout.logprob_check], 1, -iteration - 1)
    gap = parts.policy.call("logprob_gap", fresh, parts.features.of(pictures(fresh)))
    if not gap <= limit:
        raise Stop(
            f"after the weight sync of iteration {iteration} engine and learner differ by {gap:.4f} nats per token "
            f"(rollout.logprob_gap_limit is {limit}). The engine does not run the learner's weights, or computes in "
            "another precision; PPO would learn from wrong ratios, so the run stops here.",
            saves=False,
        )
    return {"rollout/logprob_gap": gap}


def evaluate(prompts: Sequence[Prompt], parts: Parts) -> dict[str, float]:
    """Mean greedy reward per task over held-out prompts, as eval/<task>. Invalid samples are left out."""
    rewards: dict[str, list[float]] = {}
    size = parts.config.eval.batch
    for start in range(0, len(prompts), size):
        scoring = parts.scorer.begin(1)
        parts.sampler.greedy(prompts[start : start + size], scoring.add)
        for s in enough_valid(scoring.results(), parts.config.max_invalid_fraction):
            if s.invalid is None:
                rewards.setdefault(s.rollout.prompt.task, []).append(s.reward)
    return {f"eval/{task}": sum(values) / len(values) for task, values in sorted(rewards.items())}
