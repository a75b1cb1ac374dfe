"""Tests the PPO update: which parameters are trained, and that packing does not change the gradient."""

from dataclasses import replace

import pytest
import torch

from benchmarks.harness import busy_process
from rl.learner.batch import Batch, collate
from rl.learner.policy import Policy
from rl.learner.targets import Targets, make_targets
from rl.types import Prompt, Rollout, Scored
from tests.support.learner import batch_of, features_of, options

REPEATS = 200  # how often a test computes the same result


def targets_of(batch: Batch, policy: Policy) -> Targets:
    values = 0.1 * torch.ones(batch.response_mask.shape) * batch.response_mask
    return make_targets(batch, values, values[:, 0], policy.options.ppo)


def gradients(policy: Policy, batch: Batch, budget: int, old: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Returns the gradients of a minibatch that contains the whole batch. `budget` is the token budget."""
    learner = policy.options.learner.model_copy(update={"token_budget": budget})
    policy.options = replace(policy.options, learner=learner)
    policy._accumulate(batch.groups, batch, targets_of(batch, policy), features_of(policy), old)
    found = {name: p.grad.clone() for name, p in policy.trained.items() if p.grad is not None}
    policy.optimizer.adamw.zero_grad()
    return found


@pytest.mark.parametrize(
    "ppo",
    [
        {},
        {"ratio": "clip", "entropy": 0.01},
        {"tis_policy": "before_update"},
        {
            "rollout_correction": {
                "verl": {"rollout_is": "sequence", "rollout_rs": "token_k1", "rollout_rs_threshold": 1.1}
            }
        },
        {"ratio": "clip", "policy_loss": {"verl": "gspo"}},
    ],
)
def test_gradients_do_not_depend_on_how_a_minibatch_is_split(folder, ppo):
    policy = Policy(folder, options(ppo))
    batch = batch_of(policy)
    old = policy.logprobs(batch, features_of(policy)) if ppo else None
    whole, split = (gradients(policy, batch, budget, old) for budget in (4096, 24))
    assert whole.keys() == policy.trained.keys() == split.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)
    assert max(g.abs().max() for g in whole.values()) > 1e-3


def test_a_gradient_has_the_same_bits_each_time_beside_a_busy_process(folder):
    # All responses continue the last token of one prompt, so the gradient of this token is a sum of 400 terms. For a
    # sum of so many terms, torch uses several threads.
    prompt = Prompt("0", "t", ())
    policy = Policy(folder, options())
    made = [tuple(range(10 + i % 40, 14 + i % 40)) for i in range(400)]
    scored = [
        Scored(Rollout(prompt, "", "stop", tuple(range(10, 18)), ids, (-4.0,) * 4), i % 3) for i, ids in enumerate(made)
    ]
    batch = collate(scored)
    with busy_process():
        first, *others = (gradients(policy, batch, 4096) for _ in range(REPEATS))
    assert {name for other in others for name in first if not torch.equal(other[name], first[name])} == set()


def test_only_the_decoder_is_trained_and_the_encoder_stays_bit_identical(folder):
    policy = Policy(folder, options({"policy_lr": 1e-2}))
    before = {n: t.clone() for n, t in policy.model.state_dict().items()}
    batch = batch_of(policy)
    policy.update(batch, targets_of(batch, policy), features_of(policy), 1)
    after = policy.model.state_dict()
    frozen = {n for n in before if n.startswith(("vision_model.", "vit_large_projector."))}
    assert frozen and all(torch.equal(before[n], after[n]) for n in frozen)
    assert all(not torch.equal(before[n], after[n]) for n in before.keys() - frozen)
    assert not frozen & policy.weights().keys()
    assert not any(name.startswith(tuple(frozen)) for name in policy.optimizer.state())


def test_a_saved_policy_contains_the_templates_of_its_training(folder, tmp_path):
    chat, shown = tmp_path / "c.jinja", tmp_path / "s.jinja"
    chat.write_text("{{ messages[0].content }}")
    shown.write_text("{{ problem }}{{ messages }}")
    for name, given in (("plain", {}), ("named", {"chat_template": chat, "synthesis_template": shown})):
        policy = Policy(folder, options(**given))
        policy.write_model(policy.full_state(), tmp_path / name)
    assert not (tmp_path / "plain/pacore.jinja").exists()
    assert (tmp_path / "named/pacore.jinja").read_text() == shown.read_text()
    assert (tmp_path / "named/chat_template.jinja").read_text() == chat.read_text()


def test_a_rewarded_response_becomes_more_likely_and_a_punished_response_less_likely(folder):
    policy = Policy(folder, options({"policy_lr": 1e-3, "minibatches": 1}))
    batch = batch_of(policy)
    features = features_of(policy)
    before = policy.logprobs(batch, features).sum(-1)
    wanted = torch.tensor([1.0, -1.0] * 6)
    advantages = wanted[:, None] * batch.response_mask
    policy.update(batch, Targets(advantages, advantages, advantages), features, 1)
    change = policy.logprobs(batch, features).sum(-1) - before
    assert (change * wanted > 0).all()


def test_the_two_readings_of_the_report_agree_while_policy_and_engine_are_the_same(folder):
    # The ratio is 1 and nothing is clipped, so the clipped loss (the report's Eq. 2) and the plain policy gradient have
    # the same gradient.
    found = []
    for ppo in ({"ratio": "none"}, {"ratio": "clip"}):
        policy = Policy(folder, options(ppo))
        batch = batch_of(policy)
        old = policy.logprobs(batch, features_of(policy))
        found.append(gradients(policy, batch, 4096, old))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_gap_is_the_mean_difference_between_engine_and_learner_logprobs(folder):
    policy = Policy(folder, options())
    prompt = Prompt("p", "t", ())
    exact = policy.logprobs(collate([Scored(Rollout(prompt, "", "stop", (10, 11), (12, 13), (0.0, 0.0)), 0)]), {})
    off = tuple((exact[0] + torch.tensor([0.25, -0.75])).tolist())
    rollout = Rollout(prompt, "", "stop", (10, 11), (12, 13), off)
    assert policy.logprob_gap([rollout], {}) == pytest.approx(0.5, abs=1e-5)
