"""How vLLM draws a token for a request with a seed of its own: by one random number, not by one per word.

vLLM draws an exponential for every word of the vocabulary and every request, a call each, which on a CPU is a third
and more of an engine's time. One uniform number per request and the inverse of its cumulative distribution draw from
the same distribution.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

METHODS = ("forward_cpu", "forward_native")  # CPUs; GPUs, whenever requests have seeds


def inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [n] int64 of which each is the first whose cumulative probability is over the row's uniform number.

    Args:
        logprobs: [n, vocabulary] nats; -inf for words that must not be drawn.
        uniform: [n] float64 in [0, 1).
    """
    # In float64, because a sum over a vocabulary in float32 is off by more than rare words weigh.
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp_(max=logprobs.shape[1] - 1)  # NaN is beyond everything; whoever reads the logprob will see it


def install() -> None:
    """Make vLLM draw so in this process, where every request of a step has a seed and words are not cut off by top-k or
    top-p; it goes its own way otherwise. Idempotent."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    for name in METHODS:
        theirs = getattr(TopKTopPSampler, name)
        if theirs.__module__ != __name__:
            setattr(TopKTopPSampler, name, _instead_of(theirs))


def _instead_of(theirs: Any) -> Any:
    def forward(
        self: Any, logits: Tensor, generators: Mapping[int, Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if len(generators) != len(logits) or k is not None or p is not None:
            return theirs(self, logits, generators, k, p)
        if self.logprobs_mode != "processed_logprobs":
            raise ValueError(f"logprobs_mode is {self.logprobs_mode!r}; our engines report processed_logprobs")
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        uniform = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        for row, generator in generators.items():
            uniform[row].uniform_(generator=generator)
        return inverse_cdf(logprobs, uniform), logprobs

    return forward
