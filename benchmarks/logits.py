"""Compares the peak memory of two computations of logprobs and entropies: in parts, and for all tokens at once.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered). The function `token_logprobs` is
tested in tests/rl/model/test_logprobs.py.
"""

import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

from benchmarks.harness import Result, benchmark
from rl.model.logprobs import token_logprobs

TOKENS, VOCABULARY, HIDDEN = 4096, 151_936, 256
GOAL = 8.0
KIB = 1024 if sys.platform == "linux" else 1  # ru_maxrss is in KiB on Linux and in bytes elsewhere


@benchmark("logits")
def logits() -> Result:
    """Compares the peak memory of logprobs computed in parts (ours) and computed at once. Goal: ratio at least 8.

    The input has 4,096 tokens, a vocabulary of 151,936 and float32 values. Each side runs in its own process, which
    computes the mean logprob plus the mean entropy, forward and backward. The growth of the process's peak memory
    during this computation is measured. ratio is the growth of the other side, divided by the growth of our side.
    ours_s and other_s are seconds.
    """
    found = {}
    for side in ("ours", "plain"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.logits", side], capture_output=True, text=True, check=True
        )
        found[side] = json.loads(done.stdout)
    ours, plain = found["ours"], found["plain"]
    return Result(
        ours["seconds"],
        plain["seconds"],
        plain["bytes"] / ours["bytes"],
        GOAL,
        max(abs(a - b) for a, b in zip(ours["values"], plain["values"], strict=True)),
        {"goal": f"ratio at least {GOAL:g}", "ours_mib": ours["bytes"] / 2**20, "other_mib": plain["bytes"] / 2**20},
    )


def at_once(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Computes logprobs and entropies like `token_logprobs`, but with the logits of all tokens at once."""
    logs = (hidden @ head.T / temperature).log_softmax(-1)
    return logs.gather(-1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def measure(side: str) -> dict[str, object]:
    """Returns the seconds, the growth of peak memory in bytes, and mean absolute values of results and gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    head = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    compute = token_logprobs if side == "ours" else at_once
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    logprobs, entropies = compute(hidden, head, targets, 1.0)
    (logprobs.mean() + entropies.mean()).backward()
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert hidden.grad is not None and head.grad is not None
    results = logprobs, entropies, TOKENS * hidden.grad, TOKENS * head.grad
    return {
        "seconds": took,
        "bytes": (after - before) * KIB,
        "values": [float(x.detach().abs().mean()) for x in results],
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
