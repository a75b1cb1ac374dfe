"""Policy, value and entropy losses: pure functions on [N, R] tensors. Each is a sum over tokens divided by the whole
minibatch's token count, so that a minibatch may be split into parts whose gradients are added.

`mask` (bool) is True where the policy chose the token; the other tensors are not used where it is False. Besides its
loss, a function may return `Sums`: statistics summed over tokens, to be added over parts (`add_sums`) and divided once
at the end (`finish_sums`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Sums = dict[str, Tensor]

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to -20 and 20: e^20 is 5e8, far from overflow in float32


@dataclass(frozen=True)
class MinibatchSize:
    """The size of the whole minibatch of an optimizer step, of which a call may get only a part."""

    tokens: int  # chosen tokens
    responses: int  # responses with at least one chosen token


class PolicyLoss(Protocol):
    """The signature of every policy loss, ours and verl's (rl.algorithm.verl_bridge)."""

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        size: MinibatchSize,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Sums]: ...


def policy_gradient_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    size: MinibatchSize,
    weights: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """PPO "omitting standard importance sampling": the ratio is 1 and never clips (`ratio: none`).

        loss = -sum_t w_t * A_t * rho_t / tokens,   rho_t = pi / stop_gradient(pi) = 1
        d loss = -sum_t w_t * A_t * d log pi_t / tokens

    Args:
        logprobs: [N, R] of the policy now, nats; the only argument that gets a gradient.
        old_logprobs: [N, R], the reference of `approx_kl`: those of the policy before the update or, if they were not
            computed, rollout_logprobs. The loss itself does not depend on them.
        advantages: [N, R].
        mask: [N, R] bool.
        size: of the whole minibatch.
        weights: [N, R] off-policy weights without gradient (tis_weights, or verl_bridge.rollout_correction);
            None: 1 everywhere.
    Returns:
        The loss (scalar) and the sums approx_kl and clip_fraction (always 0 here).
    Source: the STEP3-VL-10B report, section 3.2.1. That its words mean rho = 1 is a reconstruction, after
    SteptronOss' `use_offpolicy_without_is`.
    """
    gain = _weighted(advantages, mask, weights)
    chosen = torch.where(mask, logprobs, 0.0)
    # The difference is 0, but has the gradient of log pi. Adding 1 gives the ratio without an exp.
    ratio = chosen - chosen.detach() + 1.0
    loss = -(gain * ratio).sum() / size.tokens
    return loss, {"approx_kl": kl_sum(logprobs, old_logprobs, mask), "clip_fraction": torch.zeros_like(loss.detach())}


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    size: MinibatchSize,
    weights: Tensor | None = None,
    clip: float = 0.2,
) -> tuple[Tensor, Sums]:
    """The clipped surrogate, `ratio: clip`.

        loss = -sum_t w_t * min(rho_t * A_t, clamp(rho_t, 1 - clip, 1 + clip) * A_t) / tokens
        rho_t = pi_t / pi_old_t

    Args:
        old_logprobs: [N, R] of the policy before this iteration's first optimizer step.
        clip: epsilon, at least 0. The report does not state one; 0.2 is Open-Reasoner-Zero's.
        The other arguments are those of policy_gradient_loss.
    Returns:
        The loss and the sums approx_kl and clip_fraction (tokens whose gradient the clip removes).
    Source: Eq. 2 of the STEP3-VL-10B report; Schulman et al. 2017, arXiv:1707.06347. verl's "vanilla" adds a
    second clip for negative advantages (dual clip), which Eq. 2 does not have.
    """
    if not clip >= 0:
        raise ValueError(f"clip is {clip}; choose a number of at least 0, such as 0.2")
    advantages = torch.where(mask, advantages, 0.0)
    ratio = _log_ratio(logprobs, old_logprobs, mask).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    gain = _weighted(torch.minimum(unclipped, clipped), mask, weights)
    sums = {
        "approx_kl": kl_sum(logprobs, old_logprobs, mask),
        "clip_fraction": (clipped < unclipped).sum().to(unclipped.dtype),
    }
    return -gain.sum() / size.tokens, sums


def tis_weights(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float | None) -> tuple[Tensor, Sums]:
    """Truncated importance sampling weights min(pi / pi_rollout, cap), without gradient; 0 where mask is False.

    They correct the difference between the engine that sampled the tokens and the policy that learns from them. With
    the current logprobs of the policy (`tis_policy: current`) they also correct its change over the minibatches of an
    iteration; with those from before the update (`before_update`) they do not. The report does not say which is meant.

    Args:
        logprobs: [N, R] of the learner, now or before the update.
        rollout_logprobs: [N, R] that the engine sampled with.
        mask: [N, R] bool.
        cap: C, positive; the report's is 8. inf: no truncation, short of e^20. None: no correction, all 1.
    Returns:
        weights [N, R] and the sums tis_mean and tis_capped_fraction (tokens whose ratio is over the cap).
    Source: Yao et al. 2025, as cited by the STEP3-VL-10B report, section 3.2.1.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"tis_cap is {cap}; choose a positive number (the report's is 8) or null for no correction")
    with torch.no_grad():
        log_ratio = _log_ratio(logprobs, rollout_logprobs, mask)
        if cap is None:
            log_ratio, cap = torch.zeros_like(log_ratio), math.inf
        # min(ratio, cap) on the exact cap, after an exp that cannot overflow
        weights = torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)
        capped = mask & (log_ratio > math.log(cap))
        return weights, {"tis_mean": weights.sum(), "tis_capped_fraction": capped.sum().to(weights.dtype)}


def value_loss(values: Tensor, returns: Tensor, mask: Tensor, *, tokens: int) -> Tensor:
    """sum_t (V_t - G_t)^2 / 2 / tokens over [N, R]: plain squared error, not clipped.

    Args:
        values: [N, R] of the critic now; the only argument that gets a gradient.
        returns: [N, R] targets, from rl.algorithm.gae.gae.
        mask: [N, R] bool.
        tokens: chosen tokens of the critic's whole minibatch.
    Source: Eq. 3 of the STEP3-VL-10B report.
    """
    error = torch.where(mask, values - returns, 0.0)
    return 0.5 * error.square().sum() / tokens


def entropy_loss(entropies: Tensor, mask: Tensor, *, tokens: int) -> tuple[Tensor, Sums]:
    """-sum_t H_t / tokens, to be scaled by the entropy coefficient: minimising it raises the entropy.

    Args:
        entropies: [N, R] of the policy's next-token distributions, nats.
        mask: [N, R] bool.
        tokens: chosen tokens of the whole minibatch.
    Returns:
        The loss and the sum entropy.
    """
    total = torch.where(mask, entropies, 0.0).sum()
    return -total / tokens, {"entropy": total.detach()}


def kl_sum(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum over tokens of rho - 1 - log rho, an estimate of KL(old || now) that is never negative (John
    Schulman's k3), without gradient."""
    log_ratio = _log_ratio(logprobs.detach(), old_logprobs, mask)
    # expm1 keeps the digits that exp(x) - 1 loses for the small ratios of a healthy run
    return (log_ratio.expm1() - log_ratio).sum()


def add_sums(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Sums:
    """Returns the sums of two parts together."""
    return {**one, **{name: one[name] + total if name in one else total for name, total in other.items()}}


def finish_sums(sums: Mapping[str, Tensor], tokens: int) -> dict[str, float]:
    """Returns the metrics `policy/<name>`: each sum divided by its number of tokens."""
    return {f"policy/{name}": float(total) / tokens for name, total in sums.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Returns 1 - Var(G - V) / Var(G) over chosen tokens: 1 for a perfect critic, 0 for one no better than a constant.

    NaN if the returns do not vary or no token is chosen.
    """
    target, error = returns[mask].double(), (returns - values)[mask].double()
    if target.numel() == 0 or not (spread := target.var(correction=0)) > 0:
        return math.nan
    return 1.0 - float(error.var(correction=0) / spread)


def _log_ratio(logprobs: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Returns log(pi / pi_base), 0 where mask is False, clamped so that its exp does not overflow."""
    return torch.where(mask, logprobs - base, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _weighted(gain: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    weighted = gain if weights is None else gain * weights.detach()
    return torch.where(mask, weighted, 0.0)
