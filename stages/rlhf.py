"""The stage RLHF: open-ended rows that a teacher has answered, scored by a judge who compares answer and reference.

Its metrics tell whether that reward can be trusted: who wins, whether the two orders of a comparison agree, how scores
are spread, how much they go with length, how often each penalty strikes (STEP3-VL-10B's report, 3.2.2).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from rl.config import Preference
from rl.types import Prompt, Scored

TENTHS = (10, 50, 90)


@dataclass(frozen=True)
class Rlhf:
    """A stages.loop.Stage.

    Args:
        penalties: names of the recipe's penalties, as in `Scored.parts`.
    """

    penalties: frozenset[str]

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        return list(prompts)

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return list(prompts)

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return preference_metrics(scored) | penalty_metrics(scored, self.penalties)

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {f"eval/{name}": value for name, value in _shares(scored).items()}


def row_problem(prompt: Prompt, preference: Preference) -> str | None:
    """Why a row is none of this stage's, if it is not."""
    if prompt.task in preference.verifiable_tasks:
        return None
    if prompt.ground_truth is not None:
        return (
            f"row {prompt.id!r} has a ground_truth: RLHF is for what cannot be checked; keep it for RLVR, or mix its "
            f"task in with preference.verifiable_tasks: [{prompt.task}]"
        )
    if prompt.reference is None:
        return f"row {prompt.id!r} has no reference, the teacher's response that answers are compared with"
    return None


@dataclass(frozen=True)
class Comparison:
    """What a judge found about one response."""

    sample: Scored
    score: float  # of the reward, before penalties
    lead: float  # grades by which the answer is ahead of the reference
    orders_agree: bool


def comparisons(scored: Iterable[Scored]) -> list[Comparison]:
    """Of the samples that were compared with a reference (reward genrm); those that earn nothing without being
    compared, such as empty answers, are not among them."""
    found = []
    for sample in scored:
        if sample.invalid is None:
            found += [Comparison(sample, *one) for one in _compared(sample)]
    return found


def _compared(sample: Scored) -> Iterable[tuple[float, float, bool]]:
    by_part: Mapping[str, Any] = (
        sample.details if len(sample.parts) > 1 else dict.fromkeys(sample.parts, sample.details)
    )
    for part, said in by_part.items():
        if isinstance(said, Mapping) and "orders_agree" in said:
            yield sample.parts[part], said["answer"] - said["reference"], said["orders_agree"]


def preference_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """The `genrm/*` metrics."""
    found = comparisons(scored)
    if not found:
        return {}
    scores = [one.score for one in found]
    metrics = _shares(scored) | {f"score_p{tenth}": percentile(scores, tenth) for tenth in TENTHS}
    lengths = [len(one.sample.rollout.response_ids or one.sample.rollout.text) for one in found]
    if (with_length := rank_correlation(lengths, scores)) is not None:
        metrics["length_correlation"] = with_length
    return {f"genrm/{name}": value for name, value in metrics.items()}


def _shares(scored: Sequence[Scored]) -> dict[str, float]:
    """Who wins; what was not compared (empty, cut off) in a task whose answers are has lost."""
    found = comparisons(scored)
    if not found:
        return {}
    wins = [0.5 if one.lead == 0 else float(one.lead > 0) for one in found]
    compared = {one.sample.rollout.prompt.task for one in found}
    entered = [sample for sample in scored if sample.invalid is None and sample.rollout.prompt.task in compared]
    return {
        "win_rate": sum(wins) / max(len(entered), len(wins)),
        "order_agreement": statistics.fmean(one.orders_agree for one in found),
    }


def penalty_metrics(scored: Sequence[Scored], penalties: Iterable[str]) -> dict[str, float]:
    """`penalty/<part>`: how much of an offence the responses that it judges are on average; 0 and 1 make it a rate."""
    found: dict[str, float] = {}
    for name in sorted(penalties):
        if values := [sample.parts[name] for sample in scored if name in sample.parts]:
            found[f"penalty/{name}"] = statistics.fmean(values)
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho; None where one of them is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
