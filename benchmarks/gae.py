"""Compares how long our code and a loop over time steps take to compute the advantages of a large batch.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered). The function `gae` is tested in
tests/rl/algorithm/test_gae.py.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Result, benchmark, interleaved
from rl.algorithm.gae import gae

RESPONSES, TOKENS = 1024, 65_536
CASES = {"gamma 1, lam 1": (1.0, 1.0), "gamma 0.99, lam 0.95": (0.99, 0.95)}
Targets = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CaseResult:
    """The results of one case: the seconds of each side (`ours_s`, `loop_s`, `in_place_s`), and the largest errors of
    our side and of the loop (`ours_off`, `loop_off`). An error is the difference from the result of a float64 loop."""

    ours_s: float
    loop_s: float
    in_place_s: float
    ours_off: float
    loop_off: float

    @property
    def ratio(self) -> float:
        return self.loop_s / self.ours_s


@benchmark("gae")
def targets() -> Result:
    """Computes the advantages and the returns of 1,024 x 65,536 tokens. Goal: 50 times as fast as a torch loop.

    Each response fills at least half of its row, and the rest of the row is padding. Inside a response, about one in
    five stretches of 256 tokens is masked, as text from tools would be. In each step, the loop computes one column of
    the [N, R] tensors, as the code of Open-Reasoner-Zero and verl does. Their code collects the columns in a list, but
    the loop in this file writes the columns into one tensor.

    ratio is other_s / ours_s, both in wall-clock seconds. ours_s, other_s and ratio are from the case with the smallest
    ratio, and `more` has the ratios of all cases. Our call takes only a hundredth of the loop's time, so each
    measurement of our side is the median of five calls. `first_call_s` is the time of the first call in the process;
    this call also compiles the code. `ratio_in_place` is the smallest ratio of all cases if our code is compared with
    another loop. This other loop allocates no memory in its steps, and is measured only once. max_abs_diff is the
    largest difference between our results and the results of a float64 loop, over all cases. `loop_max_abs_diff` is the
    largest difference between the results of the float32 loop and the results of the float64 loop.
    """
    small = batch(1, 256)
    first_call_s, _ = timed(lambda: gae(*small, gamma=1, lam=1))
    large = batch(RESPONSES, TOKENS)
    cases = {name: compare(*large, gamma, lam) for name, (gamma, lam) in CASES.items()}
    worst = min(cases.values(), key=lambda case: case.ratio)
    more = {
        "goal": "at least 50, and errors not larger than those of the float32 loop",
        "loop_max_abs_diff": max(case.loop_off for case in cases.values()),
        "first_call_s": first_call_s,
        "ratio_in_place": min(case.in_place_s / case.ours_s for case in cases.values()),
        "threads": torch.get_num_threads(),
        **{f"ratio, {name}": case.ratio for name, case in cases.items()},
    }
    off = max(case.ours_off for case in cases.values())
    return Result(worst.ours_s, worst.loop_s, worst.ratio, 50, off, more)


def compare(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> CaseResult:
    truth = loop(by_column(rewards).double(), by_column(values).double(), by_column(mask), gamma, lam)
    off: dict[str, float] = {}

    def ours() -> float:
        took = []
        for _ in range(5):
            seconds, result = timed(lambda: gae(rewards, values, mask, gamma=gamma, lam=lam))
            took.append(seconds)
        off["ours"] = difference(result, truth)
        return statistics.median(took)

    def other() -> float:
        seconds, result = timed(lambda: loop(rewards, values, mask, gamma, lam))
        off["loop"] = difference(result, truth)
        return seconds

    ours_s, loop_s = interleaved(ours, other, repeats=3)
    in_place_s, _ = timed(lambda: loop_in_place(rewards, values, mask, gamma, lam))
    return CaseResult(ours_s, loop_s, in_place_s, off["ours"], off["loop"])


def batch(responses: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draws random rewards and values, and a mask with holes and with padding on the right."""
    draw = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(responses, tokens, generator=draw) for _ in range(2))
    lengths = torch.randint(tokens // 2, tokens + 1, (responses, 1), generator=draw)
    chosen = (torch.rand(responses, tokens // 256, generator=draw) < 0.8).repeat_interleave(256, 1)
    return rewards, values, chosen.logical_and_(torch.arange(tokens) < lengths)


def loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Targets:
    """Computes the advantages and the returns of GAE in a loop over the columns, one column per step."""
    advantages = torch.zeros_like(values)
    a_next = v_next = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * v_next - values[:, t]
        a_next = torch.where(mask[:, t], delta + gamma * lam * a_next, a_next)
        v_next = torch.where(mask[:, t], values[:, t], v_next)
        advantages[:, t] = a_next
    returns = advantages + values
    return advantages.masked_fill_(~mask, 0.0), returns.masked_fill_(~mask, 0.0)


def loop_in_place(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Targets:
    """Computes the advantages and the returns like `loop`, but allocates no memory inside the loop."""
    advantages = torch.empty_like(values)
    a_next, v_next, step = (torch.zeros_like(values[:, 0]) for _ in range(3))
    for t in reversed(range(values.shape[1])):
        chosen, value = mask[:, t], values[:, t]
        torch.add(rewards[:, t], v_next, alpha=gamma, out=step).sub_(value).add_(a_next, alpha=gamma * lam)
        torch.where(chosen, step, a_next, out=a_next)
        torch.where(chosen, value, v_next, out=v_next)
        advantages[:, t] = a_next
    returns = advantages + values
    return advantages.masked_fill_(~mask, 0.0), returns.masked_fill_(~mask, 0.0)


def by_column(x: Tensor) -> Tensor:
    """Returns a copy of the tensor in which every column is contiguous in memory. The float64 loop, whose time is not
    measured, is faster with such tensors."""
    return x.T.contiguous().T


def difference(got: Targets, truth: Targets) -> float:
    """Returns the largest absolute difference between two results. Compares 64 rows at a time to save memory."""
    return max(
        float((one - other).abs().max())
        for mine, exact in zip(got, truth, strict=True)
        for one, other in zip(mine.split(64), exact.split(64), strict=True)
    )


def timed(work: Callable[[], Targets]) -> tuple[float, Targets]:
    start = time.monotonic()
    result = work()
    return time.monotonic() - start, result
