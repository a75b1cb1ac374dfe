"""Policy, value and entropy losses: pure functions on [N, R] tensors.

Each loss is a sum over tokens, divided by the number of tokens in the whole minibatch. So a minibatch may be split into
parts, and the gradients of the parts are added.

`mask` (bool) is True where the policy chose the token. Where it is False, the other tensors are not used. Some
functions also return `Sums`: statistics that are summed over tokens. `add_sums` adds the statistics of two parts. At
the end, `finish_sums` divides the totals by the number of tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Sums = dict[str, Tensor]

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to the range from -20 to 20; e^20 is 5e8, far from overflow in float32


@dataclass(frozen=True)
class MinibatchSize:
    """The size of the whole minibatch of an optimizer step. One call of a loss may get only a part of this
    minibatch."""

    tokens: int  # chosen tokens
    responses: int  # responses with at least one chosen token


class PolicyLoss(Protocol):
    """The signature of every policy loss, both our own losses and verl's (rl.algorithm.verl_bridge)."""

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
    """The policy loss for `ratio: none`. The report describes it as PPO "omitting standard importance sampling". The
    ratio is 1, so nothing is clipped.

        loss = -sum_t w_t * A_t * rho_t / tokens,   rho_t = pi / stop_gradient(pi) = 1
        d loss = -sum_t w_t * A_t * d log pi_t / tokens

    Args:
        logprobs: [N, R] nats, of the current policy; the only argument that gets a gradient.
        old_logprobs: [N, R] nats, of the policy before the update. If the learner did not compute these logprobs, the
            caller passes the engine's logprobs instead. `old_logprobs` changes only the statistic `approx_kl`, not the
            loss.
        advantages: [N, R].
        mask: [N, R] bool.
        size: the size of the whole minibatch.
        weights: [N, R] off-policy weights without gradient (from tis_weights, or verl_bridge.rollout_correction).
            None means 1 everywhere.
    Returns:
        The loss (scalar) and the sums approx_kl and clip_fraction (always 0 here).
    Source: the STEP3-VL-10B report, section 3.2.1. We read the report's words as rho = 1. This is a reconstruction,
    based on the option `use_offpolicy_without_is` of SteptronOss.
    """
    gain = _weighted(advantages, mask, weights)
    chosen = torch.where(mask, logprobs, 0.0)
    # chosen - chosen.detach() is 0, but it has the gradient of log pi. With 1 added, it is the ratio. No exp is needed.
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
    """The clipped surrogate loss of PPO (`ratio: clip`).

        loss = -sum_t w_t * min(rho_t * A_t, clamp(rho_t, 1 - clip, 1 + clip) * A_t) / tokens
        rho_t = pi_t / pi_old_t

    Args:
        old_logprobs: [N, R] nats, of the policy before this iteration's first optimizer step.
        clip: epsilon, at least 0. The report does not state a value; 0.2 is the value of Open-Reasoner-Zero.
        The other arguments are the same as in policy_gradient_loss.
    Returns:
        The loss and the sums approx_kl and clip_fraction (the number of tokens whose gradient is 0 because of the
        clip).
    Source: Eq. 2 of the STEP3-VL-10B report; Schulman et al. 2017, arXiv:1707.06347. verl's "vanilla" loss has a
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
    """Returns the weights min(pi / pi_rollout, cap) of truncated importance sampling. They have no gradient and are 0
    where the mask is False.

    The weights correct for the difference between the engine that sampled the tokens and the policy that learns from
    them. With `tis_policy: current`, pi is the current policy. The weights then also correct for the changes of the
    policy during the update. With `tis_policy: before_update`, pi is the policy before the update, and the weights do
    not correct for the changes during the update. The report does not say which of the two policies is used.

    Args:
        logprobs: [N, R] nats, computed by the learner with either the current weights or the weights before the update.
        rollout_logprobs: [N, R] nats, computed by the engine during sampling.
        mask: [N, R] bool.
        cap: the positive constant C; 8 in the report. With inf, weights are capped only at e^20. With None, all weights
            are 1.
    Returns:
        weights [N, R] and the sums tis_mean and tis_capped_fraction (the number of tokens whose ratio is over the cap).
    Source: Yao et al. 2025, as cited by the STEP3-VL-10B report, section 3.2.1.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"tis_cap is {cap}; choose a positive number (8 in the report) or null for no correction")
    with torch.no_grad():
        log_ratio = _log_ratio(logprobs, rollout_logprobs, mask)
        if cap is None:
            log_ratio, cap = torch.zeros_like(log_ratio), math.inf
        # log_ratio is clamped, so exp cannot overflow. The result of exp is also clamped, so that a capped weight is
        # exactly `cap`.
        weights = torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)
        capped = mask & (log_ratio > math.log(cap))
        return weights, {"tis_mean": weights.sum(), "tis_capped_fraction": capped.sum().to(weights.dtype)}


def value_loss(values: Tensor, returns: Tensor, mask: Tensor, *, tokens: int) -> Tensor:
    """Returns sum_t (V_t - G_t)^2 / 2 / tokens: the squared error without any clipping.

    Args:
        values: [N, R] from the current critic; the only argument that gets a gradient.
        returns: [N, R] targets, from rl.algorithm.gae.gae.
        mask: [N, R] bool.
        tokens: the number of chosen tokens in the critic's whole minibatch.
    Source: Eq. 3 of the STEP3-VL-10B report.
    """
    error = torch.where(mask, values - returns, 0.0)
    return 0.5 * error.square().sum() / tokens


def entropy_loss(entropies: Tensor, mask: Tensor, *, tokens: int) -> tuple[Tensor, Sums]:
    """Returns the loss -sum_t H_t / tokens. Minimising this loss raises the entropy. The caller multiplies the loss by
    the entropy coefficient.

    Args:
        entropies: [N, R] nats, of the policy's next-token distributions.
        mask: [N, R] bool.
        tokens: the number of chosen tokens in the whole minibatch.
    Returns:
        The loss, and the statistic `entropy` as a sum over tokens.
    """
    total = torch.where(mask, entropies, 0.0).sum()
    return -total / tokens, {"entropy": total.detach()}


def kl_sum(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns sum_t (rho_t - 1 - log rho_t), without gradient. This sum estimates KL(old || now) and is never negative
    (John Schulman's k3)."""
    log_ratio = _log_ratio(logprobs.detach(), old_logprobs, mask)
    # In a healthy run, log-ratios are small. For small x, expm1(x) is exact, but exp(x) - 1 loses digits.
    return (log_ratio.expm1() - log_ratio).sum()


def add_sums(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Sums:
    """Adds the sums of two parts, for each name separately."""
    return {**one, **{name: one[name] + total if name in one else total for name, total in other.items()}}


def finish_sums(sums: Mapping[str, Tensor], tokens: int) -> dict[str, float]:
    """Returns the metrics `policy/<name>`: each sum divided by the number of tokens."""
    return {f"policy/{name}": float(total) / tokens for name, total in sums.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Returns 1 - Var(G - V) / Var(G) over chosen tokens.

    The result is 1 for a perfect critic, and 0 for a critic that is no better than a constant. The result is NaN if the
    returns do not vary or no token is chosen.
    """
    target, error = returns[mask].double(), (returns - values)[mask].double()
    if target.numel() == 0 or not (spread := target.var(correction=0)) > 0:
        return math.nan
    return 1.0 - float(error.var(correction=0) / spread)


def _log_ratio(logprobs: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Returns log(pi / pi_base), and 0 where the mask is False. The result is clamped to the range from -20 to 20, so
    that exp(result) does not overflow."""
    return torch.where(mask, logprobs - base, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _weighted(gain: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    weighted = gain if weights is None else gain * weights.detach()
    return torch.where(mask, weighted, 0.0)
