"""Tests checkpoints of policy and critic in one process. tests/rl/learner/test_distributed.py tests several ranks."""

import pytest
import torch

from rl.learner.critic import Critic
from rl.learner.policy import Policy
from rl.learner.targets import make_targets
from rl.model.hf_folder import CheckpointError
from tests.support.learner import batch_of, features_of, options


def test_saving_and_restoring_continues_bit_for_bit(folder, tmp_path):
    cfg = options({"policy_lr": 1e-3, "critic_lr": 1e-3})
    policy, critic = Policy(folder, cfg), Critic(folder, cfg)
    batch = batch_of(policy)
    features = features_of(policy)

    def step(policy: Policy, critic: Critic, iteration: int) -> None:
        values, final = critic.values(batch, features)
        targets = make_targets(batch, values, final, cfg.ppo)
        critic.update(batch, targets, features, iteration)
        policy.update(batch, targets, features, iteration)

    step(policy, critic, 1)
    models = {"policy": policy, "critic": critic}
    steps = {name: model.save(tmp_path / name, tmp_path / "state" / name) for name, model in models.items()}
    step(policy, critic, 2)  # this step runs while the checkpoint is being written
    while not policy.written() or not critic.written():
        pass
    other, valuer = Policy(folder, cfg), Critic(folder, cfg)
    other.restore(tmp_path / "policy", tmp_path / "state/policy", steps["policy"])
    valuer.restore(tmp_path / "critic", tmp_path / "state/critic", steps["critic"])
    step(other, valuer, 2)
    for a, b in ((policy.model, other.model), (critic.model, valuer.model)):
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_a_folder_that_lacks_weights_is_refused_with_their_names(folder, tmp_path):
    critic = Critic(folder, options())
    tensors = critic.full_state()
    del tensors["value_head.weight"]
    critic.write_model(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks the tensors value_head\.weight"):
        critic.read_model(tmp_path)
