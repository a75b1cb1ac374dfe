"""Advantages and returns along the tokens a policy chose: pure functions, no loop over time.

Every tensor is [N, R]: N responses, padded to R columns; `mask` (bool) is True where the policy chose the token.
A row may have holes (text that a tool wrote) as well as padding.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 32  # columns that one triangular matrix product covers; larger ones cost more and round worse
_BLOCK = 1 << 18  # elements worked on at a time, so that temporaries stay in the processor's cache


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation along the tokens the policy chose.

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next

    "next" is the next column whose mask is True; columns in between add no delta and cost no factor of gamma.
    After the last one A_next = 0 and V_next = `bootstrap`.

    Args:
        rewards: [N, R] float, paid on emitting token t.
        values: [N, R] float, the critic's estimate before token t is emitted.
        mask: [N, R] bool. What the other tensors hold where it is False is never looked at.
        gamma, lam: discount per token and GAE's lambda, both in [0, 1].
        bootstrap: [N] float, value of the state after the last token, for responses cut off before they
            ended; 0 for those that did end. None: 0 for all.
    Returns:
        advantages, returns (advantages + values): [N, R] float32 (float64 if `values` is), 0 where mask is
        False, not normalised.
    Raises:
        ValueError: shapes differ, the mask is not bool, or gamma or lam is outside [0, 1].
    Source: Schulman et al. 2016, arXiv:1506.02438, section 3; Eq. 1 of the STEP3-VL-10B report.
    """
    _check(rewards, values, mask, gamma, lam, bootstrap)
    dtype = torch.promote_types(values.dtype, torch.float32)
    advantages = torch.empty(values.shape, dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    rows = max(1, _BLOCK // max(1, values.shape[1])) if values.device.type == "cpu" else max(1, len(values))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        ending = None if bootstrap is None else bootstrap[part]
        a, ret = _gae_rows(rewards[part], values[part], mask[part], gamma, lam, ending)
        advantages[part], returns[part] = a, ret
    return advantages, returns


def _check(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None) -> None:
    shapes = {"rewards": tuple(rewards.shape), "values": tuple(values.shape), "mask": tuple(mask.shape)}
    if values.dim() != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"gae wants rewards, values and mask of one shape [N, R], got {shapes}")
    if bootstrap is not None and bootstrap.shape != values.shape[:1]:
        raise ValueError(f"bootstrap is {tuple(bootstrap.shape)} but there are {len(values)} responses; pass one each")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; pass a bool tensor (mask.bool())")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; choose a number from 0 to 1")


def _gae_rows(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of some rows, by way of the returns G = A + V, which take fewer passes over memory:
    G_t = r_t + gamma * (1 - lam) * V_next + gamma * lam * G_next, where G_next = V_next after the last token."""
    column = _packed_columns(mask)
    keep = _bits(mask, _working_dtype(values))
    value, income = _pack(values, keep, column), _pack(rewards, keep, column)
    if gamma * (1 - lam):
        income[:, :-1].add_(value[:, 1:], alpha=gamma * (1 - lam))
    if bootstrap is not None:
        length = mask.sum(1, keepdim=True)
        ending = torch.where(length > 0, gamma * bootstrap.to(income.dtype)[:, None], 0.0)
        income.scatter_add_(1, (length - 1).clamp(min=0), ending)
    returns = _discounted_sums_to_come(income, gamma * lam)
    advantages = returns - value
    if column is None:
        return advantages, returns
    return _zero_outside(advantages.gather(1, column), keep), _zero_outside(returns.gather(1, column), keep)


def _working_dtype(values: Tensor) -> torch.dtype:
    """float32 unless the caller's values are finer, or matrix products are set to round float32 to less."""
    backend = torch.backends.mkldnn if values.device.type == "cpu" else torch.backends.cuda
    exact = backend.matmul.fp32_precision in ("none", "ieee")  # pyrefly: ignore[missing-attribute]  # set up at run time
    return torch.promote_types(values.dtype, torch.float32 if exact else torch.float64)


def _bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as integers as wide as `dtype`: all bits set where True. `&` with it is several times faster on
    CPU than torch.where, and unlike a product turns NaN into 0."""
    return mask.view(torch.int8).to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


def _zero_outside(x: Tensor, keep: Tensor) -> Tensor:
    return (x.view(keep.dtype) & keep).view(x.dtype)


def _packed_columns(mask: Tensor) -> Tensor | None:
    """[n, R] where each chosen token goes if a row's tokens move left together; None if all are there already."""
    ones = mask.view(torch.int8)
    if ones[:, 1:].numel() == 0 or (ones[:, 1:] - ones[:, :-1]).amax() <= 0:
        return None
    return (mask.cumsum(1) - 1).clamp_(min=0)


def _pack(x: Tensor, keep: Tensor, column: Tensor | None) -> Tensor:
    """The chosen tokens of `x` moved to the left, 0 after them."""
    chosen = _zero_outside(x.to(torch.float64 if keep.dtype == torch.int64 else torch.float32), keep)
    return chosen if column is None else torch.zeros_like(chosen).scatter_add_(1, column, chosen)


def _discounted_sums_to_come(x: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay * y_{t+1} along the rows of [n, R]: within chunks by one matrix product, then the same
    over the chunks' totals, each of which counts decay^_CHUNK less than the one before."""
    n, width = x.shape
    size = max(1, min(_CHUNK, width))
    if width % size:
        x = F.pad(x, (0, -width % size))
    within, until_next = _powers(decay, size, x.dtype, x.device)
    sums = x.reshape(n, -1, size) @ within
    if sums.shape[1] > 1:
        totals = _discounted_sums_to_come(sums[:, :, 0], decay**size)
        sums[:, :-1].addcmul_(totals[:, 1:, None], until_next)
    return sums.reshape(n, -1)[:, :width]


@lru_cache(maxsize=64)
def _powers(decay: float, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """decay^(j - i) for j >= i, else 0, as [j, i], and decay^(size - i), as [i]; exact before they are rounded."""
    steps = torch.arange(size, dtype=torch.float64, device=device)
    within = torch.tril(decay ** (steps[:, None] - steps).clamp(min=0))
    return within.to(dtype), (decay ** (size - steps)).to(dtype)


def normalize(advantages: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / max(std, 1e-8) over all chosen tokens of the batch; 0 where mask is False.

    The standard deviation is the population's. Means are taken in float64: in float32 the rounding of the mean
    of equal advantages, divided by 1e-8, would come out as advantages of order 1.

    Raises:
        ValueError: no token is chosen.
    Source: reconstruction. The report does not say whether it normalises; Open-Reasoner-Zero, which it follows,
    normalises over the batch with this floor.
    """
    chosen = advantages[mask].double()
    if not len(chosen):
        raise ValueError("no token to normalise over: mask is False everywhere; leave such a batch out")
    std, mean = torch.std_mean(chosen, correction=0)
    normal = (advantages.double() - mean) / std.clamp(min=1e-8)
    return torch.where(mask, normal, 0.0).to(advantages.dtype)


def terminal_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Rewards [N, R] that pay a response's whole score [N] on its last chosen token.

    Raises:
        ValueError: a response without any chosen token has a score other than 0.
    """
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(1)
    if (lost := (last < 0) & (scores != 0)).any():
        raise ValueError(f"responses {lost.nonzero().flatten().tolist()} have a score but no token to pay it on")
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    return rewards.scatter_(1, last.clamp(min=0)[:, None], scores[:, None])
