"""Computes the advantages and the returns of the tokens that the policy chose. All functions are pure functions of
tensors.

Every tensor is [N, R]: N responses, padded to R columns. `mask` (bool) is True where the policy chose the token. It is
False on padding, and on text that a tool wrote into the response.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

# The number of tensor elements that one task of a thread computes. With this number, a task takes milliseconds, and
# there are enough tasks for all threads.
_TASK = 1 << 20


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the tokens that the policy chose.

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next

    "next" is the next column whose mask is True. Columns whose mask is False are skipped: they add no delta, and they
    do not multiply anything by gamma. At the last column whose mask is True, A_next = 0 and V_next = `bootstrap`.

    A compiled loop computes the advantages in float64 on the CPU, with torch.get_num_threads() threads. Tensors on
    another device are copied to the CPU. The first call in a process compiles the loop, which takes a second or two.

    Args:
        rewards: [N, R] float, the reward of emitting token t.
        values: [N, R] float, the critic's estimate before token t is emitted.
        mask: [N, R] bool. The other tensors are not read where the mask is False.
        gamma, lam: discount per token and GAE's lambda, both in [0, 1].
        bootstrap: [N] float. For a response that was cut before its end: the value of the state after its last token.
            For a response that ended: 0. None means 0 for all responses.
    Returns:
        advantages and returns (advantages + values). Both are [N, R] float32 (float64 if `values` is float64), on the
        device of `values`. They are 0 where the mask is False. They are not normalised and have no gradient.
    Raises:
        ValueError: shapes differ, the mask is not bool, or gamma or lam is outside [0, 1].
    Source: Schulman et al. 2016, arXiv:1506.02438, section 3; Eq. 1 of the STEP3-VL-10B report.
    """
    _check(rewards, values, mask, gamma, lam, bootstrap)
    count, width = values.shape
    dtype = torch.promote_types(values.dtype, torch.float32)
    ending = torch.zeros(count) if bootstrap is None else bootstrap
    inputs = _array(rewards, dtype), _array(values, dtype), _array(mask, torch.bool), _array(ending, torch.float64)
    # These arrays come from numpy because numpy uses huge pages. With a large torch tensor, page faults would take as
    # much time as the arithmetic. New pages contain zeros, so the loop writes nothing where the mask is False.
    advantages, returns = np.zeros((count, width), inputs[1].dtype), np.zeros((count, width), inputs[1].dtype)

    kernel = _compiled()
    rows = max(1, _TASK // max(1, width))

    def work(start: int) -> None:
        kernel(start, min(start + rows, count), *inputs, float(gamma), float(gamma * lam), advantages, returns)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(0, count, rows)))  # list() raises the exceptions of the threads
    return torch.from_numpy(advantages).to(values.device), torch.from_numpy(returns).to(values.device)


def _check(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None) -> None:
    shapes = {"rewards": tuple(rewards.shape), "values": tuple(values.shape), "mask": tuple(mask.shape)}
    if values.dim() != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"rewards, values and mask must have the same shape [N, R], but are {shapes}")
    if bootstrap is not None and bootstrap.shape != values.shape[:1]:
        raise ValueError(f"bootstrap has shape {tuple(bootstrap.shape)}; pass {len(values)} values, one per response")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; pass a bool tensor (mask.bool())")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; choose a number from 0 to 1")


def _gae_rows(
    start: int,
    stop: int,
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    bootstrap: np.ndarray,
    gamma: float,
    decay: float,
    advantages: np.ndarray,
    returns: np.ndarray,
) -> None:
    """Fills rows `start` to `stop - 1` of `advantages` and `returns`. Both must contain only zeros before the call.

    The variables `a_next` and `v_next` are float64.
    """
    width = values.shape[1]
    for i in range(start, stop):
        a_next, v_next = 0.0, bootstrap[i]
        for back in range(width):
            t = np.uint64(width - 1 - back)  # uint64: an index that may be negative makes the loop a third slower
            if mask[i, t]:
                a_next = rewards[i, t] + gamma * v_next - values[i, t] + decay * a_next
                v_next = values[i, t]
                advantages[i, t] = a_next
                returns[i, t] = a_next + v_next


@cache
def _compiled() -> Callable[..., None]:
    """Compiles _gae_rows to machine code that does not hold Python's global lock (GIL).

    numba is imported inside this function, so a process that does not call `gae` does not import numba. The machine
    code is not cached on disk: a cache would save a third of a second per run, but would need a writable folder.
    """
    from numba import njit

    return njit(nogil=True, fastmath={"contract"})(_gae_rows)  # "contract": a * b + c may become one instruction


def _array(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Returns the tensor as a contiguous numpy array of type `dtype`. The data is copied only if this is necessary."""
    return x.detach().to("cpu", dtype).contiguous().numpy()


def normalize(advantages: Tensor, mask: Tensor) -> Tensor:
    """Returns (A - mean) / max(std, 1e-8) for all chosen tokens of the batch, and 0 where the mask is False.

    The standard deviation of N advantages is computed with the divisor N, not N - 1. Means are computed in float64. In
    float32, the mean of equal advantages would have a rounding error. Divided by 1e-8, this error would give advantages
    of about 1 instead of 0.

    Raises:
        ValueError: no token is chosen.
    Source: reconstruction. The report does not say whether advantages are normalised. The report follows
    Open-Reasoner-Zero, which normalises over the batch. In Open-Reasoner-Zero, the divisor is also at least 1e-8.
    """
    chosen = advantages[mask].double()
    if not len(chosen):
        raise ValueError("no token to normalise over: mask is False everywhere; leave such a batch out")
    std, mean = torch.std_mean(chosen, correction=0)
    normal = (advantages.double() - mean) / std.clamp(min=1e-8)
    return torch.where(mask, normal, 0.0).to(advantages.dtype)


def terminal_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Returns rewards [N, R] for scores [N]: the last chosen token of each response gets the whole score of the
    response.

    Raises:
        ValueError: a response without any chosen token has a score other than 0.
    """
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(1)
    if (lost := (last < 0) & (scores != 0)).any():
        raise ValueError(f"responses {lost.nonzero().flatten().tolist()} have a score but no token")
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    return rewards.scatter_(1, last.clamp(min=0)[:, None], scores[:, None])
