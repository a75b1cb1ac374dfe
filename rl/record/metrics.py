"""All metrics: what each means and whether higher or lower is better. Computes those of rewards and responses.

A metric without an entry in METRICS cannot be written to a run folder. Names are `room/quantity`.
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
    """Meaning of one metric. In `name`, `<task>` and `<part>` stand for one word, a name that the recipe chooses."""

    name: str
    better: Better
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("iteration", "neither", "Which iteration; 0 is the evaluation before any training."),
    Metric("stage", "neither", "The stage that made this line: rlvr, rlhf or pacore."),
    Metric(
        "reward/mean",
        "higher",
        "Mean reward of the iteration's valid samples, sampled at the training temperature; noisy, "
        "because every iteration draws other prompts.",
    ),
    Metric(
        "reward/std",
        "neither",
        "Standard deviation of the rewards of valid samples; near 0 there is nothing left to tell good from bad.",
    ),
    Metric("reward/<task>", "higher", "Mean reward of the valid samples of one task."),
    Metric(
        "reward/<task>/<part>",
        "higher",
        "Mean of one component of that task's reward, before weighting; shows which part moves the whole.",
    ),
    Metric(
        "reward/invalid_fraction",
        "lower",
        "Share of samples left out of the loss because something around the model failed (reward code, "
        "endpoint); should be 0, and anything lasting needs a look at the reasons in rollouts/.",
    ),
    Metric(
        "reward/flat_group_fraction",
        "lower",
        "Share of prompts whose valid samples all got the same reward; they tell the policy little, and a"
        " value near 1 means the prompts are too easy or too hard.",
    ),
    Metric(
        "eval/<task>",
        "higher",
        "Mean greedy reward on one task's held-out problems: the number to trust.",
    ),
    Metric(
        "response/tokens_mean",
        "neither",
        "Mean response length in tokens; reasoning tends to lengthen and perception to shorten while both improve.",
    ),
    Metric("response/tokens_mean/<task>", "neither", "Mean response length in tokens of one task."),
    Metric(
        "response/truncated_fraction",
        "lower",
        "Share of responses cut off at the length limit; if it grows, the model rambles or the limit is too tight.",
    ),
    Metric(
        "pacore/prompts",
        "higher",
        "Prompts of the iteration that showed messages; fewer than asked for where fresh ones were too few or outside "
        "the bounds on their accuracy.",
    ),
    Metric("pacore/messages_mean", "neither", "Messages that a prompt shows, on average."),
    Metric("pacore/message_accuracy", "neither", "Share of the shown messages that are right."),
    Metric(
        "pacore/accuracy",
        "higher",
        "Share of responses that are right (`accept`); synthesis pays where it is above the messages' accuracy.",
    ),
    Metric(
        "pacore/accuracy/none",
        "higher",
        "Share of right responses where every shown message is wrong: emergent correctness, beyond copying.",
    ),
    Metric(
        "pacore/accuracy/under_half",
        "higher",
        "Share of right responses where some messages are right, but less than half.",
    ),
    Metric(
        "pacore/accuracy/half_or_more",
        "higher",
        "Share of right responses where at least half of the messages are right.",
    ),
    Metric(
        "pacore/repeats_majority",
        "neither",
        "Share of responses whose final answer is the most frequent of the shown ones; near 1 synthesis is voting.",
    ),
    Metric(
        "pacore/referred_fraction",
        "neither",
        "Share of the shown messages that a response names by number, or whose answer its thinking quotes.",
    ),
    Metric(
        "eval/win_rate",
        "higher",
        "Share of held-out rows whose greedy answer the judge grades above the teacher's reference; ties count half, "
        "answers that are empty or cut off as lost.",
    ),
    Metric(
        "eval/order_agreement",
        "higher",
        "Share of the comparisons of eval/win_rate in which both orders have the same winner.",
    ),
    Metric("genrm/win_rate", "higher", "The same share as eval/win_rate, of the sampled answers."),
    Metric(
        "genrm/order_agreement",
        "higher",
        "Share of comparisons in which the same side wins in both orders; near 0.5 the judge decides by the order.",
    ),
    Metric("genrm/score_p10", "neither", "Score that a tenth of the compared answers do not exceed, before penalties."),
    Metric("genrm/score_p50", "neither", "Median score of the compared answers; 0.5 is as good as the teacher's."),
    Metric(
        "genrm/score_p90",
        "neither",
        "Score that nine tenths of the compared answers do not exceed; if p10, p50 and p90 are equal, the judge does "
        "not tell the answers apart.",
    ),
    Metric(
        "genrm/length_correlation",
        "neither",
        "Spearman's rank correlation of response length and score; far above 0 the judge pays for length.",
    ),
    Metric("penalty/<part>", "lower", "Mean offence that a penalty finds in the responses it judges, 0 to 1."),
    Metric(
        "policy/loss",
        "neither",
        "The policy-gradient loss, whose gradient matters and whose value does not: it need not fall.",
    ),
    Metric(
        "policy/entropy",
        "neither",
        "Mean entropy (nats) of the policy's next-token distribution; it falls slowly while learning, and"
        " a fast drop towards 0 means exploration has ended.",
    ),
    Metric(
        "policy/approx_kl",
        "lower",
        "Estimated KL (nats per token) from the policy that sampled to the updated one: the size of the "
        "step; spikes warn of too high a learning rate.",
    ),
    Metric(
        "policy/clip_fraction",
        "lower",
        "Share of tokens whose ratio the clipped loss cut off; 0 by definition where the ratio is not clipped.",
    ),
    Metric("policy/grad_norm", "neither", "Norm of the policy's gradient before clipping; watch for jumps."),
    Metric("policy/skipped_steps", "lower", "Optimizer steps left out because their gradient was not finite."),
    Metric("policy/lr", "neither", "The policy's learning rate at the last step, warm-up included."),
    Metric(
        "policy/tis_mean",
        "neither",
        "Mean truncated importance weight between learner and engine; 1 when both agree.",
    ),
    Metric(
        "policy/tis_capped_fraction",
        "lower",
        "Share of tokens whose importance weight hit the cap; above a few per mille, engine and learner disagree.",
    ),
    Metric("value/loss", "lower", "Half the mean squared error of the critic's values against the returns."),
    Metric("value/grad_norm", "neither", "Norm of the critic's gradient before clipping; watch for jumps."),
    Metric("value/skipped_steps", "lower", "Critic's optimizer steps left out because the gradient was not finite."),
    Metric(
        "value/explained_variance",
        "higher",
        "Share of the returns' variance the critic foresees: 1 is perfect, 0 no better than a constant, "
        "and below 0 worse than that.",
    ),
    Metric(
        "rollout/logprob_gap",
        "lower",
        "Mean |engine - learner| logprob (nats per token) at equal weights; above the configured limit "
        "the engine does not run the weights it was sent.",
    ),
    Metric(
        "rollout/tokens_per_second",
        "higher",
        "Response tokens generated per second, all workers together.",
    ),
    Metric(
        "rollout/staleness",
        "lower",
        "Mean number of updates by which the weights that sampled a token lagged behind.",
    ),
    Metric(
        "response/continued_fraction",
        "neither",
        "Share of responses that weights of several iterations sampled, each a part (rollout.partial).",
    ),
    Metric("rollout/replaced_engines", "lower", "Engines that died or hung in this iteration and were replaced."),
    Metric(
        "time/rollout",
        "lower",
        "Seconds spent waiting for samples; with rollout.max_staleness 1 most samples are made before.",
    ),
    Metric("time/reward", "lower", "Seconds spent waiting for rewards after the last sample had finished."),
    Metric(
        "time/critic",
        "lower",
        "Seconds waiting for the critic: values, and the time by which its update takes longer than the policy's.",
    ),
    Metric("time/policy", "lower", "Seconds in the policy: logprobs and its update."),
    Metric("time/sync", "lower", "Seconds to bring the new weights into the workers and to check them."),
    Metric(
        "time/learner_encodings",
        "lower",
        "Pictures that the learner's vision tower encoded from the last weight sync to this one; each once while its "
        "features are cached. A resumed run starts without a cache.",
    ),
    Metric("time/engine_encodings", "lower", "Pictures that the engines' vision towers encoded in the same time."),
    Metric(
        "checkpoint/seconds",
        "lower",
        "Seconds to write the checkpoint that was finished in this iteration; training continues in most of them.",
    ),
    Metric("checkpoint/blocked_seconds", "lower", "Seconds that training waited for this checkpoint."),
    Metric("checkpoint/mib", "lower", "Size of this checkpoint in MiB."),
    Metric("time/total", "lower", "Seconds of the whole iteration, evaluation included."),
)
_BY_NAME = {metric.name: metric for metric in METRICS}
_TEXT = ("stage",)


def describe(name: str) -> Metric:
    """Returns the entry for a name such as `reward/counting`. Raises ValueError if there is none."""
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
    """Raises ValueError for a metric that is not in METRICS or is not a finite number (`stage`: a text)."""
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
    """Returns why `task` cannot be a task's name, which becomes part of metric names; None if it can."""
    if "/" in task:
        return f"task {task!r} has a '/', which metric names use to separate a task from its parts"
    if any(f"{room}/{task}" in _BY_NAME for room in ("reward", "eval")):
        return f"task {task!r} would share its name with the metric reward/{task}; pick another"
    return None


def rollout_metrics(scored: Sequence[Scored], rollouts_per_prompt: int) -> dict[str, float]:
    """Returns the `reward/*` and `response/*` metrics of an iteration.

    Args:
        scored: the iteration's samples, those of one prompt next to each other.
        rollouts_per_prompt: samples per prompt; must divide the number of samples.
    Returns:
        Rewards are means over valid samples, lengths over all samples. Means without any sample, such as the reward of
        a task whose samples are all invalid, are left out. `reward/std` is the population's standard deviation.
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
    """Ignores groups without a valid sample."""
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
    """Samples by task, in alphabetical order of tasks, so that runs can be compared line by line."""
    tasks: dict[str, list[Scored]] = {}
    for sample in scored:
        tasks.setdefault(sample.rollout.prompt.task, []).append(sample)
    return dict(sorted(tasks.items()))
