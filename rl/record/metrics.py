"""Finds the descriptions of metrics, checks metrics, and computes the metrics of rewards and responses.

metrics.yaml, beside this file, says what each metric means and whether higher or lower is better. A metric can be
written to a run folder only if it has an entry in metrics.yaml or in `own_metrics` of a stage.
"""

import difflib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rl.recipe.stages import registered
from rl.types import Scored

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """The meaning of one metric. The placeholders `<task>` and `<part>` in `name` stand for names from the recipe."""

    name: str
    better: Better
    meaning: str


METRICS = tuple(
    Metric(name, **entry) for name, entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_bytes()).items()
)
_BY_NAME = {metric.name: metric for metric in METRICS}
_TEXT = ("stage",)


def describe(name: str) -> Metric:
    """Returns the entry for a metric name such as `reward/counting`. Raises ValueError if there is no entry."""
    fitting = [metric for metric in METRICS if _fits(name.split("/"), metric.name.split("/"))]
    if name in _BY_NAME or fitting:
        return _BY_NAME.get(name) or fitting[0]
    for stage in registered().values():
        if meaning := stage.own_metrics.get(name):
            return Metric(name, "neither", meaning)
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"; the most similar name is {near[0]}" if near else ""
    raise ValueError(
        f"metric {name!r} has no entry in rl/record/metrics.yaml{hint}; to log the metric, add an entry there, "
        "or to own_metrics of its stage"
    )


def _fits(words: list[str], pattern: list[str]) -> bool:
    """True if the parts of a metric's name (`words`) match the parts of a pattern such as reward/<task>/<part>."""
    pairs = zip(words, pattern, strict=False)
    return len(words) == len(pattern) and all(word and (word == p or p[0] == "<") for word, p in pairs)


def check(metrics: Mapping[str, Any]) -> None:
    """Raises ValueError if a metric has no entry, or if its value has the wrong type. The value of `stage` must be
    text. All other values must be finite numbers."""
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
    """Returns the reason why a task cannot have the name `task`, or None if the name is allowed. Metric names contain
    the names of tasks."""
    if "/" in task:
        return f"task {task!r} has a '/', but in metric names a '/' ends the name of the task"
    if any(f"{room}/{task}" in _BY_NAME for room in ("reward", "eval")):
        return f"task {task!r} would share its name with the metric reward/{task}; choose another name"
    return None


def rollout_metrics(scored: Sequence[Scored], rollouts_per_prompt: int) -> dict[str, float]:
    """Returns the `reward/*` and `response/*` metrics of an iteration.

    Args:
        scored: the samples of the iteration. Samples of the same prompt are next to each other.
        rollouts_per_prompt: the number of samples per prompt. The total number of samples must be a multiple of this
            number.
    Returns:
        Rewards are means over valid samples, and lengths are means over all samples. A mean over no samples is left
        out. For example, a task whose samples are all invalid has no mean reward. `reward/std` is the population
        standard deviation.
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
    """Returns the share of groups in which all valid samples have the same reward. Ignores groups without a valid
    sample."""
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
