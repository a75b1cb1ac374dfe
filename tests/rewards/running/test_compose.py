"""Tests that several rewards and penalties give one score, and that a batch is scored while it is sampled."""

from pathlib import Path

import pytest

from rewards.endpoint import EndpointSpec
from rewards.running.runner import RewardRunner
from rl.config import RewardSpec
from tests.support.reward_plugins import penalty_spec, rollout, spec

# Several rewards and penalties


def test_a_task_sums_weighted_rewards_and_each_penalty_lowers_only_its_own_reward(
    runner: RewardRunner,
) -> None:
    calm, rude = [rollout("5", task="sum"), rollout("5!", task="sum")]
    first, second = runner.score([calm, rude])
    # The reward is 0.8 * obey + 0.2 * exact - 0.1 * rank. The penalty `rude` lowers obey with the magnitude 0.5.
    # Response "5": obey is 0.5, exact is 1, and rank is 0 (the shortest response). The reward is 0.4 + 0.2 - 0 = 0.6.
    # Response "5!": the penalty is 0.5, so obey is 0.5 * (1 - 0.5 * 0.5) = 0.375. exact is 0, and rank is 1. The reward
    # is 0.3 + 0 - 0.1 = 0.2.
    assert first.reward == pytest.approx(0.6)
    assert first.parts == {"obey": 0.5, "rude": 0.0, "exact": 1.0, "rank": 0.0}
    assert second.reward == pytest.approx(0.3 - 0.1)
    assert second.parts == {"obey": 0.5, "rude": 0.5, "exact": 0.0, "rank": 1.0}
    assert set(first.details) == {"obey", "exact"} and first.details["exact"] == {"answer": "5"}


def test_the_bounds_of_a_task_are_the_weighted_sums_of_its_rewards_bounds(runner: RewardRunner) -> None:
    assert (runner.lowest("sum"), runner.highest("sum")) == pytest.approx((-0.1, 1.0))


def test_a_full_offence_takes_a_reward_to_its_lowest_value_even_below_zero(runner: RewardRunner) -> None:
    scored = runner.score([rollout(text, task="signed") for text in ("", "!", "!!")])
    assert [one.reward for one in scored] == [1.0, 0.0, -1.0]


def test_a_sample_is_invalid_if_any_of_its_parts_is_invalid(runner: RewardRunner) -> None:
    dead, offended = runner.score([rollout("die", task="sum", prompt="a"), rollout("!!!", task="sum", prompt="b")])
    assert dead.invalid == "reward obey: its process was killed by SIGKILL"
    assert offended.invalid == "penalty rude: returned 1.5; the value of a penalty must be between 0 (no offence) and 1"


@pytest.mark.parametrize("given", [spec("plugins.py:rude"), spec("exact", penalties=(penalty_spec("exact"),))])
def test_a_penalty_cannot_be_used_as_a_reward_or_a_reward_as_a_penalty(plugins: Path, given: RewardSpec) -> None:
    with pytest.raises(ValueError, match=r"is a (penalty|reward) and belongs under (penalties|rewards)"):
        RewardRunner({"t": [given]}, plugins)


def test_a_task_cannot_use_a_row_judge_and_a_reward_cannot_judge_rows(plugins: Path) -> None:
    with pytest.raises(ValueError, match="'judge_row' is a row judge and scores data rows, not responses"):
        RewardRunner({"t": [spec("plugins.py:judge_row")]}, plugins)
    with pytest.raises(ValueError, match="row judge j: 'exact' is a reward and belongs under rewards"):
        RewardRunner({}, row_judges={"j": spec("exact")})


def test_endpoint_names_include_the_endpoints_of_row_judges() -> None:
    judge = spec("checkable", {"endpoint": "judge"})
    runner = RewardRunner({}, row_judges={"j": judge}, endpoints={"judge": EndpointSpec("judge", "", "m")})
    assert runner.endpoint_names() == {"judge"}


# A batch that is scored while it is sampled


def test_rollouts_may_be_added_in_any_order_and_a_group_is_scored_when_complete(runner: RewardRunner) -> None:
    rollouts = [rollout("x" * n, task="rank", prompt="a") for n in (3, 1)] + [rollout("fine"), rollout("print")]
    scoring = runner.begin(per_prompt=2)
    for place in (3, 1, 2, 0):
        scoring.add(place, rollouts[place])
    scored = scoring.results()
    assert [one.rollout for one in scored] == rollouts
    assert [one.reward for one in scored] == [0.1, 0.0, 0.25, 0.25]


def test_an_incomplete_group_is_an_error(runner: RewardRunner) -> None:
    scoring = runner.begin(per_prompt=2)
    scoring.add(0, rollout("x", task="rank"))
    with pytest.raises(ValueError, match="1 prompts do not have all of their 2 rollouts yet"):
        scoring.results()
