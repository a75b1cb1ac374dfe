"""Compares verl's functions with the functions of this project. The results must be equal, except for the differences
that are listed in the docstring of verl_bridge. Also tests that results do not depend on how a minibatch is split."""

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rl.algorithm import verl_bridge
from rl.algorithm.gae import gae
from rl.algorithm.losses import MinibatchSize, PolicyLoss, clipped_policy_loss, finish_sums, tis_weights, value_loss

# All losses in the registry of verl 0.9.1. test_every_registered_loss_is_listed_here fails if verl adds a loss.
ACCEPTED = ["vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "dro", "cispo"]
BY_SPLIT = ["clip_cov", "kl_cov"]
NEEDED: dict[str, dict[str, float | str]] = {"dro": {"dro_beta": 0.5}}


class Case:
    """Six responses of 1 to 9 tokens. The mask has gaps, old and new logprobs differ, and each token has a weight."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        draw = torch.randn(5, 6, 9, generator=generator, dtype=dtype)
        self.logprobs = -draw[0].abs()
        self.old = self.logprobs + 0.5 * draw[1]
        self.rollout = self.old + 0.3 * draw[2]
        self.advantages, self.values = 3 * draw[3], draw[4]
        self.mask = torch.arange(9) < torch.tensor([1, 9, 4, 6, 2, 8])[:, None]
        self.mask &= torch.rand(6, 9, generator=generator) < 0.8
        self.mask[:, 0] = True
        self.size = MinibatchSize(int(self.mask.sum()), 6)
        self.weights = tis_weights(self.old, self.rollout, self.mask, cap=1.2)[0]

    def run(self, loss: PolicyLoss, *parts: slice, weighted: bool = True) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Calls `loss` once for each range of rows in `parts`. The tensors of each call are as wide as the longest
        response in the range. Returns the summed loss, its gradient, and the summed metrics."""
        leaf = self.logprobs.clone().requires_grad_()
        total, metrics = torch.zeros((), dtype=leaf.dtype), {}
        for part in parts or (slice(0, 6),):
            width = slice(0, int(self.mask[part].nonzero()[:, 1].max()) + 1)
            rows = (x[part, width] for x in (leaf, self.old, self.advantages, self.mask))
            weights = self.weights[part, width] if weighted else None
            value, sums = loss(*rows, size=self.size, weights=weights)
            total = total + value
            for key, x in finish_sums(sums, self.size.tokens).items():
                metrics[key] = metrics.get(key, 0.0) + x
        return total.detach(), torch.autograd.grad(total, leaf)[0], metrics


SPLITS = [(slice(0, 1), slice(1, 6)), (slice(0, 3), slice(3, 5), slice(5, 6)), tuple(slice(i, i + 1) for i in range(6))]


def registry() -> dict[str, Any]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return POLICY_LOSS_REGISTRY


@pytest.fixture
def registered_by_a_user() -> Iterator[str]:
    from verl.trainer.ppo.core_algos import register_policy_loss

    @register_policy_loss("mine")
    def mean_of_the_part(
        old, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, weights=None
    ):
        return -(log_prob * advantages * response_mask).sum() / response_mask.sum(), {}

    yield "mine"
    del registry()["mine"]


def test_importing_the_bridge_does_not_import_verl() -> None:
    code = "import rl.algorithm.verl_bridge, sys; raise SystemExit('verl' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_every_registered_loss_is_listed_here() -> None:
    assert set(registry()) == {*ACCEPTED, *BY_SPLIT, "bypass_mode"}
    assert verl_bridge.policy_loss_names() == [name for name in registry() if name in ACCEPTED]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_gradients_and_metrics_do_not_depend_on_the_split(name: str, weighted: bool) -> None:
    case, loss = Case(), verl_bridge.policy_loss(name, NEEDED.get(name))
    whole = case.run(loss, weighted=weighted)
    assert whole[1][case.mask].abs().sum() > 0 and not whole[1][~case.mask].any()
    for parts in SPLITS:
        split = case.run(loss, *parts, weighted=weighted)
        torch.testing.assert_close(split[:2], whole[:2], rtol=1e-6, atol=1e-9)
        assert split[2] == pytest.approx(whole[2], rel=1e-5)


@pytest.mark.parametrize("mode", ["token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_no_aggregation_mode_depends_on_the_split(mode: str) -> None:
    factor = {"loss_scale_factor": 100} if mode.endswith("norm") else {}
    case, loss = Case(), verl_bridge.policy_loss("vanilla", {"loss_agg_mode": mode, **factor})
    torch.testing.assert_close(case.run(loss, *SPLITS[1])[:2], case.run(loss)[:2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", BY_SPLIT)
def test_losses_that_are_refused_for_their_split_really_depend_on_the_split(name: str) -> None:
    raw = registry()[name]
    loss = verl_bridge.VerlPolicyLoss(name, raw, verl_bridge._actor_config(name, {}, raw))
    assert verl_bridge._depends_on_split(loss)
    with pytest.raises(ValueError, match="depends on how a minibatch is split"):
        verl_bridge.policy_loss(name)


def test_the_error_for_bypass_mode_says_which_options_to_use_instead() -> None:
    with pytest.raises(ValueError, match=r"ppo\.rollout_correction"):
        verl_bridge.policy_loss("bypass_mode")


def test_a_users_loss_that_normalises_each_part_is_refused(registered_by_a_user: str) -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"mine with \{\} is refused: on an example"):
        verl_bridge.policy_loss(registered_by_a_user)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_error_for_an_unknown_loss_lists_all_losses() -> None:
    with pytest.raises(ValueError, match=r"no policy loss 'gsop'; choose one of vanilla, .*gspo.*cispo"):
        verl_bridge.policy_loss("gsop")


def test_wrong_parameters_say_what_to_do() -> None:
    refused: list[tuple[str, dict[str, float | str], str]] = [
        ("gspo", {"clip_ratio_hihg": 0.1}, "did you mean clip_ratio_high"),
        ("sapo", {"clip_ratio": 0.1}, "it has tau_pos, tau_neg"),
        ("gspo", {"clip_ratio": "big"}, "give a number"),
        ("gpg", {"loss_agg_mode": "mean"}, "choose one of token-mean"),
        ("gpg", {"loss_agg_mode": "seq-mean-token-sum-norm"}, "needs loss_scale_factor"),
        ("dro", {}, "dro_beta must be a positive value"),
    ]
    for name, parameters, message in refused:
        with pytest.raises(ValueError, match=message):
            verl_bridge.policy_loss(name, parameters)


def test_vanilla_without_its_dual_clip_is_our_clipped_loss() -> None:
    case = Case()
    ours = case.run(partial(clipped_policy_loss, clip=0.1))
    theirs = case.run(verl_bridge.policy_loss("vanilla", {"clip_ratio": 0.1}))
    torch.testing.assert_close(theirs[:2], ours[:2])
    assert theirs[2] == pytest.approx(ours[2])


def test_dual_clip_lowers_the_loss_of_a_bad_token_that_became_much_more_likely() -> None:
    old, logprobs = torch.tensor([[0.0]]), torch.tensor([[10.0]]).log()  # the ratio is 10
    args = logprobs, old, -torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    size = MinibatchSize(1, 1)
    assert float(clipped_policy_loss(*args, size=size)[0]) == pytest.approx(10)
    assert float(verl_bridge.policy_loss("vanilla")(*args, size=size)[0]) == pytest.approx(10)
    assert float(verl_bridge.policy_loss("vanilla", {"clip_ratio_c": 3})(*args, size=size)[0]) == pytest.approx(3)


def test_clip_ratio_sets_both_sides_unless_one_is_given() -> None:
    config = verl_bridge.policy_loss("gspo", {"clip_ratio": 0.1, "clip_ratio_high": 0.3}).config
    assert (config.clip_ratio_low, config.clip_ratio_high) == (0.1, 0.3)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_gradient_is_finite_with_extreme_ratios_and_with_any_values_outside_the_mask(name: str) -> None:
    case, loss = Case(torch.float32), verl_bridge.policy_loss(name, NEEDED.get(name))
    clean = case.run(loss)
    for field in ("logprobs", "old", "advantages", "weights"):
        setattr(case, field, torch.where(case.mask, getattr(case, field), math.nan))
    torch.testing.assert_close(case.run(loss)[:2], clean[:2])
    case.old = case.old - 500.0
    assert all(x.isfinite().all() for x in case.run(loss)[:2])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.9, 0.0)])
def test_verls_gae_equals_ours_after_whitening(gamma: float, lam: float) -> None:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return
    from verl.utils.torch_functional import masked_whiten

    case = Case()
    mask = case.mask.double()
    rewards = case.advantages
    theirs, their_returns = compute_gae_advantage_return(rewards, case.values, mask, gamma, lam)
    ours, our_returns = gae(rewards, case.values, case.mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(our_returns[case.mask], their_returns[case.mask])
    torch.testing.assert_close(masked_whiten(ours, mask)[case.mask], theirs[case.mask])
    assert not torch.allclose(ours[case.mask], theirs[case.mask])  # verl always whitens advantages


def test_verls_value_loss_equals_ours_if_its_clip_has_no_effect() -> None:
    from verl.trainer.ppo.core_algos import compute_value_loss

    case = Case()
    now, old, returns = case.values, case.values - 1, case.advantages
    tokens = case.size.tokens
    free, clipped = (
        float(compute_value_loss(now, returns, old, case.mask.double(), clip, batch_num_tokens=tokens)[0])
        for clip in (1e9, 0.2)
    )
    ours = float(value_loss(now, returns, case.mask, tokens=tokens))
    assert free == pytest.approx(ours)
    assert clipped > ours  # verl uses the clipped or the unclipped error, whichever is larger


def test_token_weights_are_our_truncated_importance_weights() -> None:
    case = Case()
    found = verl_bridge.rollout_correction(
        case.old, case.rollout, case.mask, rollout_is="token", rollout_is_threshold=1.2
    )
    ours, sums = tis_weights(case.old, case.rollout, case.mask, cap=1.2)
    assert found.weights is not None and not found.weights.requires_grad
    torch.testing.assert_close(found.weights, ours)
    assert torch.equal(found.mask, case.mask)
    for name, total in sums.items():
        assert float(found.sums[name]) == pytest.approx(float(total), rel=1e-5)


def test_sequence_weights_multiply_over_a_response() -> None:
    old, rollout = torch.tensor([[1.5, 2.0, 7.0], [9.0, 1.0, 1.0]]).log(), torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    weights = verl_bridge.rollout_correction(old, rollout, mask, rollout_is="sequence", rollout_is_threshold=4).weights
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[3.0, 3, 0], [4, 4, 4]]))


def test_weights_outside_a_pair_of_thresholds_become_zero() -> None:
    old, rollout, mask = torch.tensor([[0.4, 1, 6]]).log(), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    found = verl_bridge.rollout_correction(old, rollout, mask, rollout_is="token", rollout_is_threshold="0.5_5")
    assert found.weights is not None and found.weights.tolist() == [[0, 1, 0]]


def test_rejection_removes_tokens_or_whole_responses_from_the_mask() -> None:
    old, rollout = torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 1.0]]).log(), torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    correct = partial(verl_bridge.rollout_correction, old, rollout, mask)
    token = correct(rollout_rs="token_k1", rollout_rs_threshold="0.5_2")
    assert token.mask.tolist() == [[True, False, True], [True, True, False]]
    assert token.weights is None and token.sums["tis_mean"] == 4
    response = correct(rollout_rs="seq_max_k3", rollout_rs_threshold=0.5)  # k3 of the ratio 3 is 3 - 1 - log 3 = 0.9
    assert response.mask.tolist() == [[False] * 3, [True, True, False]]


RS = [f"token_k{k}" for k in (1, 2, 3)] + [f"seq_{s}_k{k}" for s in ("sum", "mean", "max") for k in (1, 2, 3)]


@pytest.mark.parametrize("rollout_is", ["token", "sequence"])
@pytest.mark.parametrize("rollout_rs", [name for name in RS if name != "seq_max_k1"])
def test_corrections_of_a_response_do_not_depend_on_the_others(
    rollout_is: Literal["token", "sequence"], rollout_rs: str
) -> None:
    case = Case()
    correct = partial(
        verl_bridge.rollout_correction, rollout_is=rollout_is, rollout_rs=rollout_rs, rollout_rs_threshold=1.1
    )
    whole = correct(case.old, case.rollout, case.mask)
    for i in range(6):
        alone = correct(*(x[i : i + 1] for x in (case.old, case.rollout, case.mask)))
        torch.testing.assert_close(alone.weights, whole.weights[i : i + 1] if whole.weights is not None else None)
        assert torch.equal(alone.mask, whole.mask[i : i + 1])


@pytest.mark.parametrize("gap", [-1e4, 1e4])
@pytest.mark.parametrize("rollout_is", ["token", "sequence"])
def test_extreme_gaps_give_finite_weights(gap: float, rollout_is: Literal["token", "sequence"]) -> None:
    old, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    found = verl_bridge.rollout_correction(
        old,
        torch.where(mask, old - gap, math.nan),
        mask,
        rollout_is=rollout_is,
        rollout_is_threshold=8,
    )
    assert found.weights is not None and found.weights.isfinite().all() and found.weights.max() <= 8


def test_corrections_that_make_no_sense_are_refused() -> None:
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="Invalid rollout_rs option"):
        verl_bridge.rollout_correction(x, x, mask, rollout_rs="token_k9", rollout_rs_threshold=2)
    with pytest.raises(ValueError, match="no token to correct"):
        verl_bridge.rollout_correction(x, x, ~mask, rollout_is="token")
