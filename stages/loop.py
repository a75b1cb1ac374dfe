"""One PPO iteration, step by step:

prompts -> rollouts -> scores -> values -> targets -> critic and policy updates -> new weights in the engines
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from rl.config import Config
from rl.learner.batch import collate
from rl.learner.clients import CriticClient, PolicyClient
from rl.learner.features import FeatureStore
from rl.learner.targets import make_targets
from rl.record.metrics import rollout_metrics
from rl.stop import Stop
from rl.types import Picture, Prompt, Rollout, RowScore, Scored
from rollout.data.pictures import PictureWatch
from stages.ahead import Ahead
from stages.base import Stage

AnyScore = TypeVar("AnyScore", Scored, RowScore)


class Sampler(Protocol):
    """Samples responses. The interface of rollout.pool.EnginePool, rollout.partial.PartialRollouts and test doubles."""

    def sample(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> Iterable[tuple[int, Rollout]]: ...
    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]: ...
    def greedy(self, prompts: Sequence[Prompt]) -> Iterable[tuple[int, Rollout]]: ...
    def load(self, weights: Any, policy_step: int) -> None: ...
    def encodings(self) -> int: ...
    @property
    def policy_step(self) -> int: ...


class Scoring(Protocol):
    """Scores finished rollouts while other rollouts are still being sampled. The interface of
    rewards.running.runner.Scoring."""

    def add(self, place: int, rollout: Rollout) -> None: ...
    def results(self) -> list[Scored]: ...


class Scorer(Protocol):
    """Scores rollouts. The interface of rewards.running.runner.RewardRunner and test doubles."""

    def begin(self, per_prompt: int) -> Scoring: ...


@dataclass(frozen=True)
class Services:
    """Objects that every iteration uses. These objects stay the same during a run."""

    config: Config
    sampler: Sampler
    scorer: Scorer
    policy: PolicyClient
    critic: CriticClient
    features: FeatureStore
    stage: Stage
    updates_in_parallel: bool = False  # True if policy and critic do not share a processor
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext  # a run may be interrupted in this context
    while_waiting: Callable[[], None] = lambda: None  # called repeatedly while another thread samples
    pictures: PictureWatch = field(default_factory=PictureWatch)


@dataclass(frozen=True)
class Encodings:
    """The number of pictures that the vision towers have encoded so far."""

    learner: int = 0
    engines: int = 0


@dataclass
class LoopState:
    """Values that change from iteration to iteration."""

    gap: float = float("nan")  # mean |engine - learner| of logprobs at the last weight sync, in nats
    encodings: Encodings = Encodings()  # picture counts at the last weight sync
    reported: Encodings = Encodings()  # picture counts at the last call of `new_encodings`
    ahead: Ahead["Samples"] = field(default_factory=Ahead)  # samples of the next iteration

    def new_encodings(self) -> dict[str, float]:
        """Returns the metrics time/learner_encodings and time/engine_encodings. They count the pictures that learner
        and engines have encoded since the last call of this method."""
        now, before, self.reported = self.encodings, self.reported, self.encodings
        return {
            "time/learner_encodings": float(now.learner - before.learner),
            "time/engine_encodings": float(now.engines - before.engines),
        }


@dataclass
class Clock:
    """Measures the duration of each phase of an iteration. The metrics time/* show these durations.

    Args:
        on_phase: called with the name of a phase when the phase begins.
        on_span: called with (thread, phase, start, end) when a phase has ended. Times are in seconds since 1970.
        thread: the name of the thread that runs the phases.
    """

    on_phase: Callable[[str], Any] = lambda name: None
    on_span: Callable[[str, str, float, float], None] | None = None
    thread: str = "loop"
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.on_phase(name)
        moment, start = time.time(), time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        if self.on_span:
            self.on_span(self.thread, name, moment, time.time())

    def for_thread(self, thread: str) -> "Clock":
        """Returns a clock for another thread. The new clock does not call `on_phase`, so the display does not show its
        phases."""
        return Clock(on_span=self.on_span, thread=thread)

    def metrics(self) -> dict[str, float]:
        """Returns the time/* metrics measured so far."""
        seconds = self.seconds | {"total": time.monotonic() - self.began}
        return {f"time/{name}": round(value, 4) for name, value in seconds.items()}


def ppo_iteration(
    iteration: int,
    prompts: Sequence[Prompt],
    following: Sequence[Prompt],
    services: Services,
    state: LoopState,
    clock: Clock,
) -> tuple[dict[str, float], list[Scored]]:
    """Samples and scores rollouts, updates policy and critic, and loads the new weights into the engines.

    Returns the metrics and the samples. The part before the first update runs inside `services.interruptible`: if the
    run is interrupted in this part, nothing is lost.

    With `rollout.max_staleness: 1`, the samples of this iteration were made while the previous iteration was training.
    Before the update, this function loads the newest weights into the engines, and starts a second thread. This thread
    samples the next iteration (the prompts `following`) during the update.
    """
    config = services.config
    stats: dict[str, float] = {}
    with services.interruptible():
        samples = _still_shown(_samples(iteration, prompts, services, state, clock), services)
        if config.rollout.max_staleness:
            with clock("sync"):
                stats |= catch_up(iteration - 1, prompts, services, state)
            if following:
                ahead_clock = clock.for_thread("samples ahead")
                state.ahead.start(
                    iteration + 1, lambda: collect(iteration + 1, following, services, state, ahead_clock)
                )
    try:
        stats |= learn(iteration, samples, services, clock)
    except FloatingPointError as error:
        raise Diverged(str(error), samples.scored) from error
    if not config.rollout.max_staleness:
        with clock("sync"):
            stats |= catch_up(iteration, prompts, services, state)
    tokens = sum(len(s.rollout.response_ids) for s in samples.scored)
    stats["rollout/tokens_per_second"] = tokens / samples.seconds
    lag = sum((iteration - 1 - step) * n for s in samples.scored for step, n in s.rollout.steps)
    stats["rollout/staleness"] = lag / tokens
    if config.rollout.partial:
        continued = sum(len(s.rollout.pieces) > 1 for s in samples.scored)
        stats["response/continued_fraction"] = continued / len(samples.scored)
    stats |= services.stage.metrics(samples.scored)
    return rollout_metrics(samples.scored, config.rollouts_per_prompt) | stats, samples.scored


class Diverged(RuntimeError):
    """Raised if the gradients of several successive optimizer steps were not finite. `scored` has the iteration's
    samples."""

    def __init__(self, message: str, scored: Sequence[Scored]) -> None:
        super().__init__(message)
        self.scored = scored


@dataclass(frozen=True)
class Samples:
    """The scored rollouts of one iteration."""

    scored: list[Scored]
    seconds: float  # duration of the phase `rollout`


def _samples(iteration: int, prompts: Sequence[Prompt], services: Services, state: LoopState, clock: Clock) -> Samples:
    """Returns the samples of this iteration. If the previous iteration has started to generate these samples, this
    function waits until they are complete. Otherwise this function generates the samples."""
    if not state.ahead.has(iteration):
        return collect(iteration, prompts, services, state, clock)
    with clock("rollout"):
        return state.ahead.take(iteration, services.while_waiting)


def collect(iteration: int, prompts: Sequence[Prompt], services: Services, state: LoopState, clock: Clock) -> Samples:
    """Samples the rollouts of an iteration, and scores each rollout when it arrives. Rows whose pictures cannot be read
    any more get invalid samples without text."""
    config = services.config
    scoring = services.scorer.begin(config.rollouts_per_prompt)
    with clock("rollout"):
        lost = services.pictures.unreadable(prompts)
        stage_prompts = services.stage.prompts_for_iteration(_without(prompts, lost), iteration)
        for index, rollout in services.sampler.sample(stage_prompts, config.rollouts_per_prompt, iteration):
            state.ahead.check()
            scoring.add(index, rollout)
    with clock("reward"):
        found = scoring.results() + _invalid(prompts, lost, config.rollouts_per_prompt)
        scored = require_valid(found, config.max_invalid_fraction)
    return Samples(scored, clock.seconds["rollout"])


def _without(prompts: Sequence[Prompt], lost: Mapping[int, str]) -> list[Prompt]:
    return [prompt for number, prompt in enumerate(prompts) if number not in lost]


def _invalid(prompts: Sequence[Prompt], lost: Mapping[int, str], per_prompt: int) -> list[Scored]:
    """Returns `per_prompt` invalid samples without text for each prompt in `lost` (index -> reason)."""
    return [Scored(Rollout(prompts[n], ""), 0.0, why) for n, why in lost.items() for _ in range(per_prompt)]


def _still_shown(samples: Samples, services: Services) -> Samples:
    """Returns the samples. Samples whose pictures cannot be read any more become invalid, because the learner could not
    encode these pictures. Raises Stop if too many samples are invalid."""
    prompts = list({id(s.rollout.prompt): s.rollout.prompt for s in samples.scored if s.invalid is None}.values())
    lost = {id(prompts[n]): why for n, why in services.pictures.unreadable(prompts).items()}
    if not lost:
        return samples
    marked = [replace(s, invalid=s.invalid or lost.get(id(s.rollout.prompt))) for s in samples.scored]
    return replace(samples, scored=require_valid(marked, services.config.max_invalid_fraction))


def learn(iteration: int, samples: Samples, services: Services, clock: Clock) -> dict[str, float]:
    """Computes values and targets, and updates critic and policy. Both updates run in parallel if the two models do not
    share a processor."""
    config, policy, critic = services.config, services.policy, services.critic
    batch = collate(samples.scored)
    features = services.features.of(pictures(s.rollout for s in samples.scored if s.invalid is None))
    with clock("critic"):
        values, final = critic.values(batch, features)
        targets = make_targets(batch, values, final, config.ppo)
        critic_update = critic.update(batch, targets, features, iteration)
        if not services.updates_in_parallel:
            critic_update.result()
    stats: dict[str, float] = {}
    if iteration > config.ppo.critic_only_iterations:
        with clock("policy"):
            stats |= policy.update(batch, targets, features, iteration)
    with clock("critic"):
        stats |= critic_update.result()
    services.features.trim(features)
    return stats


def pictures(rollouts: Iterable[Rollout]) -> list[Picture]:
    """Returns the distinct pictures in the prompts of the rollouts."""
    return list({picture.digest: picture for r in rollouts for picture in r.prompt.images}.values())


def require_valid(scored: list[AnyScore], limit: float) -> list[AnyScore]:
    """Returns `scored`. Raises Stop if the share of invalid scores is above `limit`. The message of Stop lists the most
    frequent reasons."""
    reasons = Counter(s.invalid for s in scored if s.invalid is not None)
    if reasons.total() <= limit * len(scored):
        return scored
    listed = "".join(f"\n  {count} x {why}" for why, count in reasons.most_common(5))
    raise Stop(
        f"{reasons.total()} of {len(scored)} samples are invalid, more than max_invalid_fraction = {limit:g} "
        f"allows. A reward, a judge or another part outside the model fails. Training on the remaining samples would "
        f"be biased.{listed}",
        saves=True,
    )


def catch_up(iteration: int, prompts: Sequence[Prompt], services: Services, state: LoopState) -> dict[str, float]:
    """Waits for the thread that samples ahead. Then calls `sync` if the engines do not have the weights of `iteration`
    yet. Returns the metric rollout/logprob_gap."""
    state.ahead.settle(services.while_waiting)
    if services.sampler.policy_step < iteration:
        sync(iteration, prompts, services, state)
    return {"rollout/logprob_gap": state.gap}


def sync(iteration: int, prompts: Sequence[Prompt], services: Services, state: LoopState) -> None:
    """Loads the policy's weights into the engines, and then checks that engines and learner compute the same logprobs.

    The engines sample short responses to a few of `prompts`, and the learner computes the logprobs of these responses
    again.
    Raises: Stop if the mean difference of the logprobs is above `rollout.logprob_gap_limit`.
    """
    options = services.config.rollout
    services.sampler.load(services.policy.weights(), iteration)
    readable = _without(prompts, services.pictures.unreadable(prompts))
    rollouts = services.sampler.check(readable[: options.logprob_check], iteration)
    gap = services.policy.logprob_gap(rollouts, services.features.of(pictures(rollouts)))
    services.features.trim()
    if not gap <= options.logprob_gap_limit:
        raise Stop(
            f"after the weight sync of iteration {iteration} engine and learner differ by {gap:.4f} nats per token "
            f"(rollout.logprob_gap_limit is {options.logprob_gap_limit}). The engine does not have the learner's "
            "weights, or computes in another precision. PPO would learn from wrong ratios, so the run stops here.",
            saves=False,
        )
    state.gap = gap
    state.encodings = Encodings(services.features.forwards, services.sampler.encodings())


def check_rows(rows: Sequence[Prompt], services: Services) -> dict[str, float]:
    """Compares engines and learner on rows with pictures, before any update. Returns the metric
    rollout/logprob_gap_rows, or {} if no row has a picture.

    `sync` uses the first rows of an iteration. This function uses the rows with the fewest and the most pixels and rows
    in between, because a difference in the treatment of pictures may depend on their size.
    Raises: Stop if the mean difference of the logprobs is above `rollout.logprob_gap_limit`.
    """
    options = services.config.rollout
    readable = _without(rows, services.pictures.unreadable(rows))
    shown = _spread(sorted((row for row in readable if row.images), key=_pixels), options.logprob_check)
    if not shown:
        return {}
    rollouts = services.sampler.check(shown, 0)
    features = services.features.of(pictures(rollouts))
    gap = services.policy.logprob_gap(rollouts, features)
    if not gap <= options.logprob_gap_limit:
        gaps = {one.prompt.id: services.policy.logprob_gap([one], features) for one in rollouts}
        worst = max(gaps, key=lambda row: gaps[row])
        raise Stop(
            f"on {len(shown)} rows with pictures, engine and learner differ by {gap:.4f} nats per token "
            f"(rollout.logprob_gap_limit is {options.logprob_gap_limit}), most on row {worst} ({gaps[worst]:.4f}). "
            "They do not treat its pictures alike. PPO would learn from wrong ratios, so the run stops here.",
            saves=False,
        )
    services.features.trim()
    return {"rollout/logprob_gap_rows": gap}


def _spread(rows: Sequence[Prompt], most: int) -> list[Prompt]:
    """Returns at most `most` rows: the first, the last, and rows at equal distances in between."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(n * (len(rows) - 1) / max(1, most - 1))] for n in range(most)]


def _pixels(row: Prompt) -> int:
    return sum(math.prod(picture.size) for picture in row.images)


def evaluate(prompts: Sequence[Prompt], services: Services) -> dict[str, float]:
    """Samples greedy responses to held-out prompts and scores them. Returns the mean reward of each task as
    eval/<task>, and the metrics that the stage adds.

    Invalid samples are left out.
    """
    rewards: dict[str, list[float]] = {}
    scored: list[Scored] = []
    size, limit = services.config.eval.batch, services.config.max_invalid_fraction
    for start in range(0, len(prompts), size):
        scoring, part = services.scorer.begin(1), prompts[start : start + size]
        lost = services.pictures.unreadable(part)
        for index, rollout in services.sampler.greedy(services.stage.held_out(_without(part, lost))):
            scoring.add(index, rollout)
        scored += require_valid(scoring.results() + _invalid(part, lost, 1), limit)
    for s in scored:
        if s.invalid is None:
            rewards.setdefault(s.rollout.prompt.task, []).append(s.reward)
    means = {f"eval/{task}": sum(values) / len(values) for task, values in sorted(rewards.items())}
    return means | dict(services.stage.evaluation(scored))
