"""Tests that the critic learns to predict the returns. Packing and a reused forward pass must not change the update."""

import pytest
import torch

from rl.learner.batch import collate
from rl.learner.critic import Critic
from rl.learner.policy import Policy
from rl.learner.targets import make_targets
from rl.model import hf_folder
from rl.types import Prompt, Rollout, Scored
from tests.support.learner import batch_of, features_of, options


def test_the_critic_learns_the_returns(folder):
    policy = Policy(folder, options())
    critic = Critic(folder, options({"critic_lr": 3e-3}))
    batch = batch_of(policy)
    features = features_of(policy)
    losses = []
    for iteration in range(15):
        values, final = critic.values(batch, features)
        targets = make_targets(batch, values, final, critic.options.ppo)
        losses.append(critic.update(batch, targets, features, iteration)["value/loss"])
    assert losses[-1] < losses[0] / 4


def test_a_new_critic_can_start_from_the_weights_of_a_saved_critic(folder, tmp_path):
    policy, earlier = Policy(folder, options()), Critic(folder, options({"critic_lr": 3e-3}))
    batch = batch_of(policy)
    features = features_of(policy)
    values, final = earlier.values(batch, features)
    earlier.update(batch, make_targets(batch, values, final, earlier.options.ppo), features, 1)
    earlier.write_model(earlier.full_state(), tmp_path / "critic")
    learned = earlier.values(batch, features)[0]
    torch.testing.assert_close(Critic(folder, options(critic=tmp_path / "critic")).values(batch, features)[0], learned)
    assert not torch.allclose(learned, values)


def test_a_folder_without_a_critic_of_the_model_is_refused(folder, tmp_path):
    policy, critic = Policy(folder, options()), Critic(folder, options())
    model = hf_folder.read_config(folder)
    critic.write_model(critic.full_state(), tmp_path / "critic")
    hf_folder.check_critic(tmp_path / "critic", model)
    critic.write_model({**critic.full_state(), "value_head.weight": torch.zeros(1, 3)}, tmp_path / "other")
    with pytest.raises(hf_folder.CheckpointError, match=r"value_head.weight has shape \(1, 3\), but the config needs"):
        hf_folder.check_critic(tmp_path / "other", model)
    policy.write_model(policy.full_state(), tmp_path / "policy")
    with pytest.raises(
        hf_folder.CheckpointError, match=r"is no critic of this model: 1 missing tensors: value_head.weight"
    ):
        hf_folder.check_critic(tmp_path / "policy", model)


def test_critic_gradients_do_not_depend_on_how_a_minibatch_is_split(folder):
    found = []
    for budget in (4096, 24):
        cfg = options({"critic_minibatches": 1, "critic_lr": 1e-3}, token_budget=budget)
        critic, policy = Critic(folder, cfg), Policy(folder, cfg)
        batch = batch_of(policy)
        features = features_of(policy)
        values, final = critic.values(batch, features)
        norm = critic.update(batch, make_targets(batch, values, final, cfg.ppo), features, 1)["value/grad_norm"]
        found.append((norm, values))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_an_update_that_reuses_a_forward_pass_gives_the_same_weights(folder):
    weights = []
    for keeps in (True, False):
        cfg = options({"critic_minibatches": 1, "critic_lr": 1e-3}, token_budget=24)
        critic, policy = Critic(folder, cfg), Policy(folder, cfg)
        batch, features = batch_of(policy), features_of(policy)
        given = (batch, make_targets(batch, *critic.values(batch, features), cfg.ppo), features)
        if not keeps:
            other = collate([Scored(Rollout(Prompt("p", "t", ()), "", "stop", (10,), (12,), (0.0,)), 0)])
            critic.values(other, {})  # this call replaces the kept autograd graph with the graph of another batch
        critic.update(*given, 1)
        critic.update(*given, 2)  # no autograd graph is kept for this update, whether `keeps` is True or False
        weights.append({name: parameter.detach() for name, parameter in critic.model.named_parameters()})
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)
