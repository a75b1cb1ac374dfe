"""Tests that every metric has a description, and that the metrics of samples have the right values."""

import math
import re

import pytest

from rl.record.metrics import METRICS, check, describe, rollout_metrics
from rl.types import Finish, Prompt, Rollout, Scored
from tests.support.command import ROOT


def sample(
    task: str,
    reward: float,
    tokens: int = 1,
    finish: Finish = "stop",
    invalid: str | None = None,
    **parts: float,
) -> Scored:
    rollout = Rollout(Prompt("p", task, ()), "text", finish, response_ids=(0,) * tokens)
    return Scored(rollout, reward, invalid, parts)


def test_every_metric_has_a_meaning_and_says_which_values_are_better() -> None:
    table = (ROOT / "rl/record/metrics.yaml").read_text()
    names = re.findall(r"^(\S+):$", table, flags=re.MULTILINE)
    assert len(names) == len(set(names)) and names == [metric.name for metric in METRICS]
    for metric in METRICS:
        assert metric.meaning.endswith(".") and metric.better in ("higher", "lower", "neither")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("reward/mean", "reward/mean"),
        ("reward/counting", "reward/<task>"),
        ("reward/counting/exact", "reward/<task>/<part>"),
        ("eval/counting", "eval/<task>"),
        ("response/tokens_mean", "response/tokens_mean"),
        ("response/tokens_mean/counting", "response/tokens_mean/<task>"),
        ("time/total", "time/total"),
    ],
)
def test_describe_returns_the_entry_of_a_metric(name: str, entry: str) -> None:
    assert describe(name).name == entry


@pytest.mark.parametrize("name", ["policy/los", "eval", "eval/", "eval/a/b", "reward/a/b/c", "response/x/y", ""])
def test_a_name_without_a_sentence_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no entry"):
        describe(name)


def test_the_message_for_an_unknown_metric_has_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="the most similar name is policy/loss"):
        check({"iteration": 1, "policy/los": 0.5})


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", True])
def test_a_value_that_is_not_a_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=f"policy/loss of iteration 3 is {value!r}"):
        check({"iteration": 3, "stage": "rlvr", "policy/loss": value})


def test_rewards_are_averaged_over_all_samples_tasks_and_parts() -> None:
    scored = [sample("b", 1.0, format=1.0), sample("b", 0.0, format=1.0), sample("a", 0.5), sample("a", 0.5)]
    metrics = rollout_metrics(scored, rollouts_per_prompt=2)
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.125))  # the variance is (0.25 + 0.25 + 0 + 0) / 4
    assert (metrics["reward/a"], metrics["reward/b"], metrics["reward/b/format"]) == (0.5, 0.5, 1.0)
    assert metrics["reward/flat_group_fraction"] == 0.5  # the rewards of b differ; a is a flat group
    check(metrics)


def test_invalid_samples_count_only_in_the_invalid_fraction() -> None:
    scored = [sample("a", 1.0), sample("a", math.nan, invalid="endpoint down")]
    metrics = rollout_metrics(scored, rollouts_per_prompt=2)
    assert (metrics["reward/mean"], metrics["reward/invalid_fraction"]) == (1.0, 0.5)
    assert metrics["reward/flat_group_fraction"] == 1.0  # the group has only one valid reward


def test_a_mean_over_no_samples_is_left_out() -> None:
    metrics = rollout_metrics([sample("a", math.nan, invalid="x")] * 2, rollouts_per_prompt=2)
    assert metrics["reward/invalid_fraction"] == 1.0
    assert not {"reward/mean", "reward/a", "reward/flat_group_fraction"} & metrics.keys()


def test_lengths_and_truncation_are_over_all_samples() -> None:
    scored = [
        sample("a", 0, 10),
        sample("a", 0, 20),
        sample("b", 0, 60, "length"),
        sample("b", 0, 30, invalid="x"),
    ]
    metrics = rollout_metrics(scored, rollouts_per_prompt=1)
    assert metrics["response/tokens_mean"] == 30
    assert (metrics["response/tokens_mean/a"], metrics["response/tokens_mean/b"]) == (15, 45)
    assert metrics["response/truncated_fraction"] == 0.25


def test_samples_that_do_not_form_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples do not split into groups of 2"):
        rollout_metrics([sample("a", 0)] * 3, rollouts_per_prompt=2)
