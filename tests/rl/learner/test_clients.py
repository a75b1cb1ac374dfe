"""Tests that clients return the same numbers as plain objects in this process. tests/rl/test_actors.py tests calls to
other processes."""

from pathlib import Path

import torch

from rl.learner.batch import collate
from rl.learner.clients import CriticClient, LearnerClient, PolicyClient
from rl.learner.critic import Critic
from rl.learner.options import LearnerOptions
from rl.learner.policy import Policy
from rl.learner.targets import make_targets
from rl.model import hf_folder
from rl.remote import Local
from rl.types import Prompt, Rollout, Scored
from tests.support.learner import config
from tests.support.models import text_model


def test_an_update_through_clients_equals_an_update_of_plain_objects(tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    hf_folder.save(text_model(), tmp_path / "model")
    made = config(folder, policy_lr=1e-2, critic_lr=1e-2)
    options = LearnerOptions.of(made)
    rollouts = [Rollout(Prompt("a", "t", ()), "", "stop", (10, 11), (token, 7), (-1.0, -2.0)) for token in (20, 30)]
    batch = collate([Scored(rollout, float(index)) for index, rollout in enumerate(rollouts)])

    plain_policy, plain_critic = Policy(folder, options), Critic(folder, options)
    targets = make_targets(batch, *plain_critic.values(batch, {}), made.ppo)
    expected = plain_policy.update(batch, targets, {}, 1) | plain_critic.update(batch, targets, {}, 1)

    policy, critic = PolicyClient(Local(Policy(folder, options))), CriticClient(Local(Critic(folder, options)))
    targets = make_targets(batch, *critic.values(batch, {}), made.ppo)
    assert policy.update(batch, targets, {}, 1) | critic.update(batch, targets, {}, 1).result() == expected
    assert policy.logprob_gap(rollouts, {}) == plain_policy.logprob_gap(rollouts, {})
    weights, plain = policy.weights().result(), plain_policy.weights()
    assert weights.keys() == plain.keys() and all((weights[name] == plain[name]).all() for name in plain)

    saved = {"policy": policy.save(tmp_path / "policy", tmp_path / "state").result()}
    while not policy.written():
        pass
    again = PolicyClient(Local(Policy(folder, options)))
    learners: dict[str, LearnerClient] = {"policy": again}
    learners["policy"].restore(tmp_path / "policy", tmp_path / "state", saved["policy"]).result()
    restored = again.weights().result()
    assert all(torch.equal(torch.as_tensor(restored[n]), torch.as_tensor(weights[n])) for n in weights)
