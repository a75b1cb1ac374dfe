"""Compares rl.algorithm.losses with values and gradients computed by hand. Also tests that extreme ratios give finite
results, and that a split minibatch gives the same gradients as a whole minibatch."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rl.algorithm.losses import (
    MinibatchSize,
    PolicyLoss,
    Sums,
    add_sums,
    clipped_policy_loss,
    entropy_loss,
    explained_variance,
    finish_sums,
    kl_sum,
    policy_gradient_loss,
    tis_weights,
    value_loss,
)

LOSSES: dict[str, PolicyLoss] = {"none": policy_gradient_loss, "clip": partial(clipped_policy_loss, clip=0.2)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def gradient(total: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(total(at), at)[0]


def test_without_a_ratio_the_gradient_is_minus_weight_times_advantage_per_token() -> None:
    def loss(logprobs: Tensor) -> Tensor:
        weights = row(1, 0.5, 7)
        return policy_gradient_loss(
            logprobs, row(0, 0, 0), row(2, -4, 7), row(1, 1, 0).bool(), size=MinibatchSize(4, 1), weights=weights
        )[0]

    # The gradient of a token is -weight * advantage / 4, because the minibatch has 4 tokens: -1 * 2 / 4 = -0.5 for the
    # first token, and -0.5 * -4 / 4 = 0.5 for the second token. The third token is masked, so its gradient is 0. The
    # loss is the sum of these gradients, because each ratio is 1.
    torch.testing.assert_close(gradient(loss, row(-1, -2, -3)), row(-0.5, 0.5, 0))
    torch.testing.assert_close(loss(row(-1, -2, -3)), torch.tensor(0.0))


def test_without_a_ratio_old_logprobs_only_feed_the_statistic() -> None:
    args = row(-2), ones(1, 1)
    size = MinibatchSize(1, 1)
    near, far = (policy_gradient_loss(row(-1), old, *args, size=size) for old in (row(-1), row(-3)))
    assert near[0] == far[0]
    assert near[1]["approx_kl"] == 0 < far[1]["approx_kl"]


def test_the_clip_removes_the_gradient_only_if_the_ratio_would_move_further_away() -> None:
    # The ratios are 1.5, 1.5, 0.5, 0.5, and the advantages are +1, -1, +1, -1. With clip 0.2, the first and the last
    # token are clipped.
    old, logprobs = row(0, 0, 0, 0), row(1.5, 1.5, 0.5, 0.5).log()
    advantages = row(1, -1, 1, -1)

    def loss(logprobs: Tensor) -> tuple[Tensor, Sums]:
        return clipped_policy_loss(logprobs, old, advantages, ones(1, 4), size=MinibatchSize(4, 1), clip=0.2)

    # For a clipped token, the loss uses the limit 1.2 or 0.8 instead of the ratio. So the loss is
    # -(1.2 - 1.5 + 0.5 - 0.8) / 4 = 0.15. The gradient of a token that is not clipped is -advantage * ratio / 4.
    value, sums = loss(logprobs)
    torch.testing.assert_close(value, torch.tensor(0.15))
    torch.testing.assert_close(gradient(lambda x: loss(x)[0], logprobs), row(0, 0.375, -0.125, 0))
    assert finish_sums(sums, tokens=4)["policy/clip_fraction"] == 0.5


def test_before_the_first_step_both_readings_of_the_report_give_the_same_gradient() -> None:
    logprobs, advantages, weights = torch.randn(3, 2, 5).unbind()
    grads = [
        gradient(
            lambda x, f=f: f(x, logprobs, advantages, ones(2, 5), size=MinibatchSize(10, 2), weights=weights)[0],
            logprobs,
        )
        for f in LOSSES.values()
    ]
    torch.testing.assert_close(*grads)


def test_weights_scale_tokens_after_clipping() -> None:
    args = row(1.5).log(), row(0), row(1), ones(1, 1)
    value = clipped_policy_loss(*args, size=MinibatchSize(1, 1), weights=row(3), clip=0.2)[0]
    torch.testing.assert_close(value, torch.tensor(-3.6))  # -weight * clipped ratio = -3 * 1.2


def test_a_negative_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip is -0\.1"):
        clipped_policy_loss(row(0), row(0), row(0), ones(1, 1), size=MinibatchSize(1, 1), clip=-0.1)


def test_tis_weights_are_the_ratio_up_to_the_cap() -> None:
    mask = row(1, 1, 1, 0).bool()
    weights, sums = tis_weights(row(2, 10, 0.5, 1).log(), row(1, 1, 1, 1).log(), mask, cap=8)
    torch.testing.assert_close(weights, row(2, 8, 0.5, 0))
    metrics = finish_sums(sums, tokens=3)
    assert metrics["policy/tis_mean"] == pytest.approx(10.5 / 3)
    assert metrics["policy/tis_capped_fraction"] == pytest.approx(1 / 3)


def test_without_a_cap_nothing_is_corrected_and_an_infinite_cap_truncates_nothing() -> None:
    args = row(1000, 2).log(), row(1, 1).log(), ones(1, 2)
    assert tis_weights(*args, cap=None)[0].tolist() == [[1, 1]]
    torch.testing.assert_close(tis_weights(*args, cap=math.inf)[0], row(1000, 2))


@pytest.mark.parametrize("cap", [0.0, -8.0, math.nan])
def test_a_cap_that_is_not_positive_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match="tis_cap is"):
        tis_weights(row(0), row(0), ones(1, 1), cap=cap)


def test_no_gradient_flows_through_tis_weights() -> None:
    logprobs = row(-1).requires_grad_()
    assert not tis_weights(logprobs, row(-2), ones(1, 1), cap=8)[0].requires_grad


def test_value_loss_is_half_the_squared_error_over_the_minibatchs_tokens() -> None:
    mask = row(1, 1, 0).bool()
    # The errors of the two chosen tokens are 3 and -1. The loss is 0.5 * (3^2 + 1^2) / 4 = 1.25.
    torch.testing.assert_close(value_loss(row(3, 0, 9), row(0, 1, 0), mask, tokens=4), torch.tensor(1.25))
    grad = gradient(lambda v: value_loss(v, row(0, 1, 0), mask, tokens=4), row(3, 0, 9))
    torch.testing.assert_close(grad, row(0.75, -0.25, 0))


def test_entropy_loss_falls_when_entropy_rises() -> None:
    loss, sums = entropy_loss(row(1, 2, 9), row(1, 1, 0).bool(), tokens=6)
    assert (loss, finish_sums(sums, tokens=6)["policy/entropy"]) == (-0.5, 0.5)


def test_the_kl_estimate_is_never_negative_and_sums_ratio_minus_one_minus_log_ratio() -> None:
    # The ratio 2 gives the term 2 - 1 - log 2, and the ratio 0.5 gives 0.5 - 1 + log 2. The sum of the terms is 0.5.
    kl = kl_sum(row(2, 0.5).log(), row(0, 0), ones(1, 2))
    torch.testing.assert_close(kl, torch.tensor(0.5))
    tiny = kl_sum(row(1e-4, -1e-4), row(0, 0), ones(1, 2))
    torch.testing.assert_close(tiny, torch.tensor(1e-8), rtol=0.05, atol=0)


@every_loss
@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_stay_finite(loss: PolicyLoss, gap: float, advantage: float) -> None:
    old, weights = row(-1e4, -1), tis_weights(row(-1e4 + gap, -1 + gap), row(-1e4, -1), ones(1, 2), cap=math.inf)[0]
    logprobs = (old + gap).requires_grad_()
    value, sums = loss(logprobs, old, row(advantage, advantage), ones(1, 2), size=MinibatchSize(2, 1), weights=weights)
    value.backward()
    assert logprobs.grad is not None
    for found in (value, logprobs.grad, weights, *sums.values()):
        assert found.isfinite().all()


@every_loss
def test_values_outside_the_mask_are_never_read(loss: PolicyLoss) -> None:
    nan = math.nan
    mask = row(0, 1, 0).bool()
    logprobs = row(nan, -1, nan).requires_grad_()
    weights, tis = tis_weights(logprobs.detach(), row(nan, -1, nan), mask, cap=8)
    value, sums = loss(logprobs, row(nan, -1, nan), row(nan, 2, nan), mask, size=MinibatchSize(1, 1), weights=weights)
    errors = value_loss(logprobs, row(nan, 0, nan), mask, tokens=1)
    (value + errors).backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, row(0, -3, 0))  # -2 from the policy loss, -1 from the value loss
    assert not any(total.isnan() for total in (*sums.values(), *tis.values()))


@every_loss
def test_gradients_and_statistics_do_not_depend_on_how_a_minibatch_is_split(loss: PolicyLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout, advantages, returns = torch.randn(
        5, 6, 9, generator=generator, dtype=torch.float64
    ).unbind()
    mask = torch.rand(6, 9, generator=generator) < 0.6
    tokens = int(mask.sum())

    def run(*parts: tuple[slice, slice]) -> tuple[Tensor, dict[str, float]]:
        leaf, sums = logprobs.clone().requires_grad_(), {}
        for part in parts:
            now, chosen = leaf[part], mask[part]
            weights, tis = tis_weights(now, rollout[part], chosen, cap=2)
            value, drift = loss(
                now, old[part], advantages[part], chosen, size=MinibatchSize(tokens, 6), weights=weights
            )
            bonus, spread = entropy_loss(-now, chosen, tokens=tokens)
            (value + 0.1 * bonus + value_loss(now, returns[part], chosen, tokens=tokens)).backward()
            for found in (tis, drift, spread):
                sums = add_sums(sums, found)
        assert leaf.grad is not None
        return leaf.grad, finish_sums(sums, tokens)

    everything = slice(0, 9)
    whole = run((slice(0, 6), everything))
    # The minibatch is split into three parts: the first row, the first 4 columns of the other rows, and the last 5
    # columns of the other rows.
    split = run((slice(0, 1), everything), (slice(1, 6), slice(0, 4)), (slice(1, 6), slice(4, 9)))
    torch.testing.assert_close(split[0], whole[0])
    assert split[1] == pytest.approx(whole[1])


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic() -> None:
    returns, mask = row(1, 2, 3, 99), row(1, 1, 1, 0).bool()
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(row(7, 7, 7, 7), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == -3  # error = 2 * return, so the result is 1 - 2^2 = -3


def test_explained_variance_of_equal_returns_is_not_a_number() -> None:
    assert math.isnan(explained_variance(row(0, 1), row(2, 2), ones(1, 2)))
