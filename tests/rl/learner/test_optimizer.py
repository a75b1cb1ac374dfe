"""Tests skipped optimizer steps and the warm-up of the learning rate, for policy and critic."""

import pytest
import torch

from rl.learner.critic import Critic
from rl.learner.policy import Policy
from rl.learner.targets import Targets
from rl.record.metrics import check
from tests.support.learner import batch_of, features_of, options


@pytest.mark.parametrize("made", [Policy, Critic])
def test_steps_without_a_finite_gradient_are_skipped_and_too_many_raise(folder, made):
    model = made(folder, options({"max_skipped_steps": 3}))  # an update has two optimizer steps
    policy = Policy(folder, options())
    batch, features = batch_of(policy), features_of(policy)
    before = {n: p.detach().clone() for n, p in model.optimizer.parameters.items()}
    bad = Targets(*(torch.full(batch.response_mask.shape, float("nan")) for _ in range(3)))
    name = "policy" if made is Policy else "value"
    metrics = model.update(batch, bad, features, 1)
    assert metrics[f"{name}/skipped_steps"] == 2 and f"{name}/loss" not in metrics
    check({"iteration": 1} | metrics)
    with pytest.raises(FloatingPointError, match=r"nan at optimizer step 1; skipped steps in a row: 3"):
        model.update(batch, bad, features, 2)
    assert all(torch.equal(before[n], p) for n, p in model.optimizer.parameters.items())


def test_a_step_that_is_made_resets_the_count_of_skipped_steps(folder):
    policy = Policy(folder, options({"max_skipped_steps": 3}))
    batch, features = batch_of(policy), features_of(policy)
    bad = Targets(*(torch.full(batch.response_mask.shape, float("nan")) for _ in range(3)))
    good = Targets(*(torch.ones(batch.response_mask.shape) for _ in range(3)))
    for iteration in range(4):
        assert policy.update(batch, bad, features, iteration)["policy/skipped_steps"] == 2
        assert policy.update(batch, good, features, iteration)["policy/skipped_steps"] == 0


def test_the_learning_rate_rises_linearly_over_the_warm_up(folder):
    policy = Policy(folder, options({"policy_lr": 1.0, "policy_warmup": 4}))
    rates = []
    for steps in range(6):
        policy.optimizer.steps = steps
        rates.append(policy.optimizer.next_lr)
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
