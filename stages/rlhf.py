"""The stage RLHF. A judge compares each answer with a teacher's response to the same row (the reference).

The metrics show whether the judge's reward can be trusted (STEP3-VL-10B report, 3.2.2). The metrics are the win rate,
the order agreement, percentiles of the scores, the correlation of score and length, and the rate of each penalty. The
judge compares two texts in both orders. The order agreement is the share of comparisons in which the same text wins in
both orders.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rl.config import Config, Preference
from rl.types import Prompt, Scored
from stages.base import Stage

if TYPE_CHECKING:
    from rollout.chat import Chat

PERCENTILES = (10, 50, 90)


class Rlhf(Stage):
    """Trains with a judge. All defaults except critic_minibatches are from the STEP3-VL-10B report."""

    name = "rlhf"
    defaults: ClassVar[Mapping[str, Any]] = {
        "iterations": 300,
        "prompts_per_iteration": 512,
        "rollouts_per_prompt": 8,
        "max_sequence_length": 32_768,
        "ppo": {"minibatches": 4, "critic_minibatches": 4},
    }
    own_options = ("preference.verifiable_tasks",)
    final_measure = "win_rate"

    @classmethod
    def row_problem(cls, prompt: Prompt, config: Config, chat: "Chat", *, trains: bool) -> str | None:
        return reference_problem(prompt, config.preference) or super().row_problem(prompt, config, chat, trains=trains)

    @classmethod
    def final_tasks(cls, config: Config) -> Collection[str]:
        """Returns the tasks whose answers are compared with a teacher's response."""
        return config.rewards.keys() - set(config.preference.verifiable_tasks)

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return preference_metrics(scored) | penalty_metrics(scored, self.tools.penalties)

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {f"eval/{name}": value for name, value in _rates(scored).items()}


def reference_problem(prompt: Prompt, preference: Preference) -> str | None:
    """Returns None if a row belongs to this stage, else the reason why not."""
    if prompt.task in preference.verifiable_tasks:
        return None
    if prompt.ground_truth is not None:
        return (
            f"row {prompt.id!r} has a ground_truth, but RLHF is for rows that cannot be verified; keep this row for "
            f"RLVR, or allow its task with preference.verifiable_tasks: [{prompt.task}]"
        )
    if prompt.reference is None:
        return f"row {prompt.id!r} has no reference (a teacher's response, with which answers are compared)"
    return None


@dataclass(frozen=True)
class ComparedSample:
    """The judge's comparison of one response with the reference."""

    sample: Scored
    score: float  # value of the reward genrm, without penalties
    lead: float  # grade of the answer minus grade of the reference
    orders_agree: bool


def comparisons(scored: Iterable[Scored]) -> list[ComparedSample]:
    """Returns the comparisons that the reward genrm has made. Leaves out samples that were not compared, such as empty
    answers."""
    found = []
    for sample in scored:
        if sample.invalid is None:
            found += [ComparedSample(sample, *values) for values in _compared(sample)]
    return found


def _compared(sample: Scored) -> Iterable[tuple[float, float, bool]]:
    by_part: Mapping[str, Any] = (
        sample.details if len(sample.parts) > 1 else dict.fromkeys(sample.parts, sample.details)
    )
    for part, details in by_part.items():
        if isinstance(details, Mapping) and "orders_agree" in details:
            yield sample.parts[part], details["answer"] - details["reference"], details["orders_agree"]


def preference_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Returns the `genrm/*` metrics."""
    found = comparisons(scored)
    if not found:
        return {}
    scores = [comparison.score for comparison in found]
    metrics = _rates(scored) | {f"score_p{percent}": percentile(scores, percent) for percent in PERCENTILES}
    rollouts = [comparison.sample.rollout for comparison in found]
    lengths = [len(rollout.response_ids or rollout.text) for rollout in rollouts]
    if (correlation := rank_correlation(lengths, scores)) is not None:
        metrics["length_correlation"] = correlation
    return {f"genrm/{name}": value for name, value in metrics.items()}


def _rates(scored: Sequence[Scored]) -> dict[str, float]:
    """Returns win rate and order agreement. A valid sample without a comparison counts as a loss if at least one other
    sample of its task has a comparison."""
    found = comparisons(scored)
    if not found:
        return {}
    wins = [0.5 if comparison.lead == 0 else float(comparison.lead > 0) for comparison in found]
    tasks = {comparison.sample.rollout.prompt.task for comparison in found}
    samples = [sample for sample in scored if sample.invalid is None and sample.rollout.prompt.task in tasks]
    return {
        "win_rate": sum(wins) / max(len(samples), len(wins)),
        "order_agreement": statistics.fmean(comparison.orders_agree for comparison in found),
    }


def penalty_metrics(scored: Sequence[Scored], penalties: Iterable[str]) -> dict[str, float]:
    """Returns the metrics `penalty/<part>`: the mean value of each penalty. For a penalty with the values 0 and 1, the
    mean is the share of samples with the penalty."""
    metrics: dict[str, float] = {}
    for name in sorted(penalties):
        if values := [sample.parts[name] for sample in scored if name in sample.parts]:
            metrics[f"penalty/{name}"] = statistics.fmean(values)
    return metrics


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile (nearest rank): value number ceil(n * percent / 100) of the n values in ascending order."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Returns Spearman's rho, or None if one of the sequences is constant."""
    from scipy.stats import spearmanr  # imported only when needed, because the import takes a second

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
