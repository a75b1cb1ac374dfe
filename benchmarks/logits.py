"""Peak memory of logprobs and entropies over a large vocabulary: a few tokens at a time against all logits at once."""

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
KIB = 1024 if sys.platform == "linux" else 1  # ru_maxrss counts KiB there, bytes elsewhere


@benchmark("logits")
def logits() -> Result:
    """Peak extra memory of plain logits over that of ours: ratio, at least 8. 4,096 tokens, 151,936 words, float32.

    Forward and backward of the sum of logprobs and entropies, each side in a process of its own; memory is how much
    its peak grew. ours_s and other_s are seconds.
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
    """What `token_logprobs` computes, as one would write it down."""
    logs = (hidden @ head.T / temperature).log_softmax(-1)
    return logs.gather(-1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def measure(side: str) -> dict[str, object]:
    """Seconds, growth of the peak in bytes, and means of the results and of the gradients."""
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
