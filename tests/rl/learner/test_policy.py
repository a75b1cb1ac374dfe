"""The PPO update: what is trained and what is not, and what must never change its gradient."""

from dataclasses import replace

import pytest
import torch

from rl.here import Here
from rl.learner.batch import Batch, collate
from rl.learner.critic import Critic
from rl.learner.features import FeatureStore
from rl.learner.policy import Policy
from rl.learner.targets import Targets, make_targets
from rl.model import hf_folder
from rl.record.metrics import check
from rl.types import Picture, Prompt, Rollout, Scored
from tests.support.learner import PICTURES, options
from tests.support.models import IMAGE_TOKEN, step_vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("step_vl")
    hf_folder.save(step_vl(), path)
    return str(path)


def batch_of(policy: Policy) -> Batch:
    """Four prompts, three of them with pictures, three responses each; engine logprobs near the policy's."""
    generator = torch.Generator().manual_seed(1)
    scored = []
    for number, images in enumerate([(), PICTURES[:1], PICTURES, PICTURES[1:]]):
        prompt_ids = (IMAGE_TOKEN,) * 4 * len(images) + tuple(range(10, 13 + number))
        prompt = Prompt(str(number), "t", (), tuple(images))
        for index in range(3):
            response = tuple(torch.randint(10, 60, (2 + number + index,), generator=generator).tolist())
            rollout = Rollout(prompt, "", "stop", prompt_ids, response, (0.0,) * len(response))
            scored.append(Scored(rollout, float(torch.rand((), generator=generator))))
    batch = collate(scored)
    logprobs = policy.logprobs(batch, features_of(policy))
    noise = 0.1 * torch.randn(logprobs.shape, generator=generator)
    return replace(batch, rollout_logprobs=(logprobs + noise) * batch.response_mask)


def features_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {p.digest: policy.encode(p) for p in PICTURES}


def targets_of(batch: Batch, policy: Policy) -> Targets:
    values = 0.1 * torch.ones(batch.response_mask.shape) * batch.response_mask
    return make_targets(batch, values, values[:, 0], policy.options.ppo)


def gradients(policy: Policy, batch: Batch, budget: int, old: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Of one minibatch that holds the whole batch, packed to `budget` tokens a row."""
    policy.options = replace(policy.options, token_budget=budget)
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


def test_a_saved_policy_carries_the_templates_that_it_was_trained_with(folder, tmp_path):
    chat, shown = tmp_path / "c.jinja", tmp_path / "s.jinja"
    chat.write_text("{{ messages[0].content }}")
    shown.write_text("{{ problem }}{{ messages }}")
    for name, given in (("plain", {}), ("named", {"chat_template": chat, "synthesis_template": shown})):
        policy = Policy(folder, options(**given))
        policy.write_model(policy.full_state(), tmp_path / name)
    assert not (tmp_path / "plain/pacore.jinja").exists()
    assert (tmp_path / "named/pacore.jinja").read_text() == shown.read_text()
    assert (tmp_path / "named/chat_template.jinja").read_text() == chat.read_text()


def test_a_rewarded_response_becomes_more_likely_and_a_punished_one_less(folder):
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
    # rho = 1 and nothing is clipped, so Eq. 2 and the plain policy gradient have one gradient
    found = []
    for ppo in ({"ratio": "none"}, {"ratio": "clip"}):
        policy = Policy(folder, options(ppo))
        batch = batch_of(policy)
        old = policy.logprobs(batch, features_of(policy))
        found.append(gradients(policy, batch, 4096, old))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_each_picture_goes_through_the_tower_once(folder):
    store = FeatureStore([Here(Policy(folder, options())) for _ in range(2)], limit_mib=1)
    for _ in range(3):
        found = store.of([*PICTURES, PICTURES[0]])
        store.trim(found)
    assert found.keys() == {p.digest for p in PICTURES}
    assert store.forwards == 2


def test_a_picture_that_was_forgotten_has_the_same_features_again(folder):
    store = FeatureStore([Here(Policy(folder, options()))], limit_mib=0)
    first = store.of(PICTURES)
    store.trim(using=[PICTURES[0].digest])
    again = store.of(PICTURES)
    store.trim()
    assert all(torch.equal(first[p.digest].result(), again[p.digest].result()) for p in PICTURES)
    assert store.forwards == 3  # the one in use was not forgotten


def test_the_gap_is_the_mean_distance_between_engine_and_learner(folder):
    policy = Policy(folder, options())
    prompt = Prompt("p", "t", ())
    exact = policy.logprobs(collate([Scored(Rollout(prompt, "", "stop", (10, 11), (12, 13), (0.0, 0.0)), 0)]), {})
    off = tuple((exact[0] + torch.tensor([0.25, -0.75])).tolist())
    rollout = Rollout(prompt, "", "stop", (10, 11), (12, 13), off)
    assert policy.logprob_gap([rollout], {}) == pytest.approx(0.5, abs=1e-5)


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


def test_a_critic_goes_on_with_the_values_of_an_earlier_one(folder, tmp_path):
    policy, earlier = Policy(folder, options()), Critic(folder, options({"critic_lr": 3e-3}))
    batch = batch_of(policy)
    features = features_of(policy)
    values, final = earlier.values(batch, features)
    earlier.update(batch, make_targets(batch, values, final, earlier.options.ppo), features, 1)
    earlier.write_model(earlier.full_state(), tmp_path / "critic")
    learned = earlier.values(batch, features)[0]
    torch.testing.assert_close(Critic(folder, options(critic=tmp_path / "critic")).values(batch, features)[0], learned)
    assert not torch.allclose(learned, values)


def test_a_folder_that_is_no_critic_of_the_model_is_refused(folder, tmp_path):
    policy, critic = Policy(folder, options()), Critic(folder, options())
    model = hf_folder.read_config(folder)
    critic.write_model(critic.full_state(), tmp_path / "critic")
    hf_folder.check_critic(tmp_path / "critic", model)
    critic.write_model({**critic.full_state(), "value_head.weight": torch.zeros(1, 3)}, tmp_path / "other")
    with pytest.raises(hf_folder.CheckpointError, match=r"value_head.weight is \(1, 3\), the config asks for"):
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


def test_an_update_that_starts_with_a_kept_forward_pass_learns_the_same(folder):
    weights = []
    for keeps in (True, False):
        cfg = options({"critic_minibatches": 1, "critic_lr": 1e-3}, token_budget=24)
        critic, policy = Critic(folder, cfg), Policy(folder, cfg)
        batch, features = batch_of(policy), features_of(policy)
        given = (batch, make_targets(batch, *critic.values(batch, features), cfg.ppo), features)
        if not keeps:
            other = collate([Scored(Rollout(Prompt("p", "t", ()), "", "stop", (10,), (12,), (0.0,)), 0)])
            critic.values(other, {})  # of a batch that is not trained on
        critic.update(*given, 1)
        critic.update(*given, 2)  # finds nothing kept, in both cases
        weights.append({name: parameter.detach() for name, parameter in critic.model.named_parameters()})
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)


def test_a_cut_response_is_worth_the_critics_estimate_where_the_recipe_bootstraps(folder):
    prompt = Prompt("p", "t", ())
    rollouts = [Rollout(prompt, "", f, (1,), (2, 3), (0.0, 0.0)) for f in ("stop", "length")]
    batch = collate([Scored(r, reward) for r, reward in zip(rollouts, (1.0, -1.0), strict=True)])
    values, final = torch.zeros(2, 2), torch.tensor([0.7, 0.6])
    lowest = make_targets(batch, values, final, options().ppo)
    assert lowest.returns.tolist() == [[1, 1], [-1, -1]]
    bootstrap = make_targets(batch, values, final, options({"truncated": "bootstrap"}).ppo)
    # the finished one keeps its reward; the cut one gets V(s_T) = 0.6 in place of its own
    torch.testing.assert_close(bootstrap.returns, torch.tensor([[1, 1], [0.6, 0.6]]))


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
    step(policy, critic, 2)  # while the first step is being written
    while not policy.written() or not critic.written():
        pass
    other, valuer = Policy(folder, cfg), Critic(folder, cfg)
    other.restore(tmp_path / "policy", tmp_path / "state/policy", steps["policy"])
    valuer.restore(tmp_path / "critic", tmp_path / "state/critic", steps["critic"])
    step(other, valuer, 2)
    for a, b in ((policy.model, other.model), (critic.model, valuer.model)):
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


@pytest.mark.parametrize("made", [Policy, Critic])
def test_steps_whose_gradient_is_not_finite_are_left_out_and_counted_until_there_are_too_many(folder, made):
    model = made(folder, options({"max_skipped_steps": 3}))  # two steps in an update
    policy = Policy(folder, options())
    batch, features = batch_of(policy), features_of(policy)
    before = {n: p.detach().clone() for n, p in model.optimizer.parameters.items()}
    bad = Targets(*(torch.full(batch.response_mask.shape, float("nan")) for _ in range(3)))
    name = "policy" if made is Policy else "value"
    metrics = model.update(batch, bad, features, 1)
    assert metrics[f"{name}/skipped_steps"] == 2 and f"{name}/loss" not in metrics
    check({"iteration": 1} | metrics)
    with pytest.raises(FloatingPointError, match=r"nan at optimizer step 1, for the 3\. time in a row"):
        model.update(batch, bad, features, 2)
    assert all(torch.equal(before[n], p) for n, p in model.optimizer.parameters.items())


def test_a_step_that_is_made_forgives_those_left_out_before(folder):
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


def test_pictures_are_known_by_their_content(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0].source)
    assert Picture.of(tmp_path / "a.png").digest == PICTURES[0].digest != PICTURES[1].digest
