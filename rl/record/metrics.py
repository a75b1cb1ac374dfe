"""Says what each metric means and whether higher or lower is better. Computes the metrics of rewards and responses.

A metric without an entry in METRICS cannot be written to a run folder. Names have the form `group/quantity`.
"""

import difflib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rl.types import Scored

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """The meaning of one metric. In `name`, `<task>` and `<part>` each stand for one name from the recipe."""

    name: str
    better: Better
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("iteration", "neither", "Number of the iteration; 0 is the evaluation before any training."),
    Metric("stage", "neither", "Name of the stage that wrote this line: rlvr, rlhf or pacore."),
    Metric(
        "reward/mean",
        "higher",
        "Mean reward of the iteration's valid samples, at the training temperature. It is noisy, because every "
        "iteration draws other prompts.",
    ),
    Metric(
        "reward/std",
        "neither",
        "Standard deviation of the rewards of valid samples. Near 0, the rewards no longer tell good responses "
        "from bad ones.",
    ),
    Metric("reward/<task>", "higher", "Mean reward of the valid samples of one task."),
    Metric(
        "reward/<task>/<part>",
        "higher",
        "Mean of one component of the task's reward, before weighting. It shows which component changes the reward.",
    ),
    Metric(
        "reward/invalid_fraction",
        "lower",
        "Share of samples that are left out of the loss because something around the model failed (reward code or "
        "endpoint). It should be 0. If it stays above 0, look at the reasons in rollouts/.",
    ),
    Metric(
        "reward/flat_group_fraction",
        "lower",
        "Share of prompts whose valid samples all got the same reward. These prompts tell the policy little; a "
        "value near 1 means that the prompts are too easy or too hard.",
    ),
    Metric(
        "eval/<task>",
        "higher",
        "Mean reward of greedy responses to one task's held-out problems. This is the number to trust.",
    ),
    Metric(
        "response/tokens_mean",
        "neither",
        "Mean response length in tokens. While both improve, responses to reasoning tasks tend to become longer, "
        "and responses to perception tasks shorter.",
    ),
    Metric("response/tokens_mean/<task>", "neither", "Mean response length in tokens of one task."),
    Metric(
        "response/truncated_fraction",
        "lower",
        "Share of responses that were cut off at the length limit. If it grows, the model rambles or the limit is "
        "too low.",
    ),
    Metric(
        "pacore/prompts",
        "higher",
        "Number of prompts in the iteration that contained messages (final answers of earlier attempts). It is "
        "lower than intended if too few prompts have enough fresh messages with an accuracy within the bounds.",
    ),
    Metric("pacore/messages_mean", "neither", "Mean number of messages in a prompt."),
    Metric("pacore/message_accuracy", "neither", "Share of the messages in prompts that are right."),
    Metric(
        "pacore/accuracy",
        "higher",
        "Share of responses that are right (option `accept`). Synthesis is worthwhile if it is above "
        "pacore/message_accuracy.",
    ),
    Metric(
        "pacore/accuracy/none",
        "higher",
        "Share of right responses to prompts in which every message is wrong. These right answers are not copied "
        "from a message.",
    ),
    Metric(
        "pacore/accuracy/under_half",
        "higher",
        "Share of right responses to prompts in which some messages are right, but less than half of them.",
    ),
    Metric(
        "pacore/accuracy/half_or_more",
        "higher",
        "Share of right responses to prompts in which at least half of the messages are right.",
    ),
    Metric(
        "pacore/repeats_majority",
        "neither",
        "Share of responses whose final answer is the most frequent answer among the messages. Near 1, synthesis "
        "does the same as voting.",
    ),
    Metric(
        "pacore/referred_fraction",
        "neither",
        "Share of the messages in prompts that the response names by number, or whose answer the response quotes "
        "in its thinking.",
    ),
    Metric(
        "eval/win_rate",
        "higher",
        "Share of held-out rows whose greedy answer gets a better grade from the judge than the teacher's "
        "reference. A tie counts half. An answer that is empty or cut off counts as lost.",
    ),
    Metric(
        "eval/order_agreement",
        "higher",
        "Share of the comparisons for eval/win_rate in which both orders of the two answers have the same winner.",
    ),
    Metric("genrm/win_rate", "higher", "Same as eval/win_rate, but for the sampled answers of the iteration."),
    Metric(
        "genrm/order_agreement",
        "higher",
        "Share of comparisons in which both orders of the two answers have the same winner. Near 0.5, the judge "
        "decides by the order.",
    ),
    Metric("genrm/score_p10", "neither", "10th percentile of the scores of the compared answers, before penalties."),
    Metric(
        "genrm/score_p50",
        "neither",
        "Median score of the compared answers; 0.5 means that an answer is as good as the teacher's reference.",
    ),
    Metric(
        "genrm/score_p90",
        "neither",
        "90th percentile of the scores of the compared answers. If p10, p50 and p90 are equal, the judge does not "
        "tell the answers apart.",
    ),
    Metric(
        "genrm/length_correlation",
        "neither",
        "Spearman's rank correlation of response length and score. Far above 0, the judge prefers long responses.",
    ),
    Metric(
        "penalty/<part>",
        "lower",
        "Mean offence, from 0 to 1, that a penalty finds in the responses that it judges.",
    ),
    Metric(
        "policy/loss",
        "neither",
        "The policy-gradient loss. Its gradient matters, but its value does not: the value need not fall.",
    ),
    Metric(
        "policy/entropy",
        "neither",
        "Mean entropy (nats) of the policy's next-token distribution. It falls slowly while the policy learns; a "
        "fast drop towards 0 means that exploration has ended.",
    ),
    Metric(
        "policy/approx_kl",
        "lower",
        "Estimated KL divergence (nats per token) from the policy that sampled to the updated policy. It measures "
        "the size of the update; spikes mean that the learning rate is too high.",
    ),
    Metric(
        "policy/clip_fraction",
        "lower",
        "Share of tokens whose ratio was clipped in the loss; always 0 if the ratio is not clipped.",
    ),
    Metric("policy/grad_norm", "neither", "Norm of the policy's gradient before clipping. Jumps are a warning."),
    Metric(
        "policy/skipped_steps",
        "lower",
        "Number of optimizer steps of the policy that were skipped because the gradient was not finite.",
    ),
    Metric("policy/lr", "neither", "The policy's learning rate at the last optimizer step, including the warm-up."),
    Metric(
        "policy/tis_mean",
        "neither",
        "Mean truncated importance weight between learner and engine; 1 if learner and engine agree.",
    ),
    Metric(
        "policy/tis_capped_fraction",
        "lower",
        "Share of tokens whose importance weight reached the cap. Above a few per mille, engine and learner disagree.",
    ),
    Metric("value/loss", "lower", "Half of the mean squared error between the critic's values and the returns."),
    Metric("value/grad_norm", "neither", "Norm of the critic's gradient before clipping. Jumps are a warning."),
    Metric(
        "value/skipped_steps",
        "lower",
        "Number of optimizer steps of the critic that were skipped because the gradient was not finite.",
    ),
    Metric(
        "value/explained_variance",
        "higher",
        "Share of the returns' variance that the critic predicts. 1 is perfect; 0 is no better than a constant, "
        "and below 0 is worse than a constant.",
    ),
    Metric(
        "rollout/logprob_gap",
        "lower",
        "Mean |engine - learner| logprob (nats per token) when both have the same weights. Above the configured "
        "limit, the engine does not run the weights that it was sent.",
    ),
    Metric(
        "rollout/tokens_per_second",
        "higher",
        "Number of response tokens that all engines together generate per second.",
    ),
    Metric(
        "rollout/staleness",
        "lower",
        "Mean number of updates by which the weights that sampled a token were older than the newest weights.",
    ),
    Metric(
        "response/continued_fraction",
        "neither",
        "Share of responses whose parts were sampled in different iterations, with different weights "
        "(rollout.partial).",
    ),
    Metric(
        "rollout/replaced_engines",
        "lower",
        "Number of engines that died or hung in this iteration and were replaced.",
    ),
    Metric(
        "time/rollout",
        "lower",
        "Seconds that the run waited for samples. With rollout.max_staleness 1, most samples are made before this "
        "time.",
    ),
    Metric("time/reward", "lower", "Seconds that the run waited for rewards after the last sample had finished."),
    Metric(
        "time/critic",
        "lower",
        "Seconds that the run waited for the critic: for its values, and for the rest of its update after the "
        "policy's update.",
    ),
    Metric("time/policy", "lower", "Seconds that the policy took to compute logprobs and to update its weights."),
    Metric("time/sync", "lower", "Seconds to send the new weights to the engines and to check them."),
    Metric(
        "time/learner_encodings",
        "lower",
        "Number of pictures that the learner's vision tower encoded since the previous weight sync. Each picture "
        "is encoded only once while its features are cached. A resumed run starts with an empty cache.",
    ),
    Metric(
        "time/engine_encodings",
        "lower",
        "Number of pictures that the engines' vision towers encoded since the previous weight sync.",
    ),
    Metric(
        "checkpoint/seconds",
        "lower",
        "Seconds to write the checkpoint that was finished in this iteration. Training continued during most of "
        "this time.",
    ),
    Metric("checkpoint/blocked_seconds", "lower", "Seconds that training waited for this checkpoint."),
    Metric("checkpoint/mib", "lower", "Size of this checkpoint in MiB."),
    Metric("time/total", "lower", "Seconds of the whole iteration, including the evaluation."),
)
_BY_NAME = {metric.name: metric for metric in METRICS}
_TEXT = ("stage",)


def describe(name: str) -> Metric:
    """Returns the entry in METRICS for a name such as `reward/counting`. Raises ValueError if there is no entry."""
    fitting = [metric for metric in METRICS if _fits(name.split("/"), metric.name.split("/"))]
    if name in _BY_NAME or fitting:
        return _BY_NAME.get(name) or fitting[0]
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ValueError(f"metric {name!r} has no sentence in rl/record/metrics.py{hint}; add one there to log it")


def _fits(words: list[str], pattern: list[str]) -> bool:
    """True if `words` match a pattern such as reward/<task>/<part>."""
    pairs = zip(words, pattern, strict=False)
    return len(words) == len(pattern) and all(word and (word == p or p[0] == "<") for word, p in pairs)


def check(metrics: Mapping[str, Any]) -> None:
    """Raises ValueError for a metric that is not in METRICS, or whose value is not a finite number (for `stage`: a
    text)."""
    for name, value in metrics.items():
        describe(name)
        wanted = "a text" if name in _TEXT else "a finite number"
        if not (isinstance(value, str) if name in _TEXT else is_finite_number(value)):
            when = metrics.get("iteration")
            raise ValueError(f"metric {name} of iteration {when} is {value!r}, not {wanted}")


def is_finite_number(value: Any) -> bool:
    """True for ints and floats except NaN and the infinities; False for bools."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def task_name_problem(task: str) -> str | None:
    """Returns why `task` cannot be the name of a task, or None if it can. Metric names contain the names of tasks."""
    if "/" in task:
        return f"task {task!r} has a '/', which metric names use to separate a task from its parts"
    if any(f"{room}/{task}" in _BY_NAME for room in ("reward", "eval")):
        return f"task {task!r} would share its name with the metric reward/{task}; pick another"
    return None


def rollout_metrics(scored: Sequence[Scored], rollouts_per_prompt: int) -> dict[str, float]:
    """Returns the `reward/*` and `response/*` metrics of an iteration.

    Args:
        scored: the samples of the iteration. Samples of the same prompt are next to each other.
        rollouts_per_prompt: samples per prompt; must divide the number of samples.
    Returns:
        Rewards are means over valid samples, and lengths are means over all samples. A mean over no samples is left
        out, such as the reward of a task whose samples are all invalid. `reward/std` is the population standard
        deviation.
    """
    if not scored or len(scored) % rollouts_per_prompt:
        raise ValueError(f"{len(scored)} samples do not split into groups of {rollouts_per_prompt}")
    valid = [sample for sample in scored if sample.invalid is None]
    metrics = _reward_metrics(valid)
    metrics["reward/invalid_fraction"] = 1 - len(valid) / len(scored)
    groups = [scored[i : i + rollouts_per_prompt] for i in range(0, len(scored), rollouts_per_prompt)]
    metrics |= _flat_groups(groups)
    metrics |= _response_metrics(scored)
    return metrics


def _reward_metrics(valid: Sequence[Scored]) -> dict[str, float]:
    if not valid:
        return {}
    rewards = [sample.reward for sample in valid]
    metrics = {"reward/mean": statistics.fmean(rewards), "reward/std": statistics.pstdev(rewards)}
    for task, samples in _by_task(valid).items():
        metrics[f"reward/{task}"] = statistics.fmean(sample.reward for sample in samples)
        for part in sorted({part for sample in samples for part in sample.parts}):
            values = [sample.parts[part] for sample in samples if part in sample.parts]
            metrics[f"reward/{task}/{part}"] = statistics.fmean(values)
    return metrics


def _flat_groups(groups: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """Returns the share of groups whose valid samples have equal rewards. Ignores groups without a valid sample."""
    rewards = [{sample.reward for sample in group if sample.invalid is None} for group in groups]
    flat = [len(distinct) == 1 for distinct in rewards if distinct]
    return {"reward/flat_group_fraction": statistics.fmean(flat)} if flat else {}


def _response_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    metrics = {"response/tokens_mean": _mean_tokens(scored)}
    for task, samples in _by_task(scored).items():
        metrics[f"response/tokens_mean/{task}"] = _mean_tokens(samples)
    cut = [sample.rollout.finish == "length" for sample in scored]
    return metrics | {"response/truncated_fraction": statistics.fmean(cut)}


def _mean_tokens(scored: Iterable[Scored]) -> float:
    return statistics.fmean(len(sample.rollout.response_ids) for sample in scored)


def _by_task(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Returns the samples of each task. Tasks are in alphabetical order, so that runs can be compared line by line."""
    tasks: dict[str, list[Scored]] = {}
    for sample in scored:
        tasks.setdefault(sample.rollout.prompt.task, []).append(sample)
    return dict(sorted(tasks.items()))
