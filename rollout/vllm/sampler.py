"""A faster sampler for vLLM requests that have a seed. It draws one random number per sampled token.

For each token, vLLM's own sampler draws one random number for every entry of the vocabulary, with one call per request.
On a CPU, these draws take more than a third of an engine's time. Our sampler draws one uniform number for each token,
and inverts the cumulative distribution at this number. The tokens have the same distribution as with vLLM's sampler.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

# vLLM calls the first method on CPUs. On GPUs, it calls the second method if requests have seeds.
METHODS = ("forward_cpu", "forward_native")


def inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Returns [n] int64: for each row of `logprobs`, the first token whose cumulative probability exceeds `uniform`.

    Args:
        logprobs: [n, vocabulary] nats; -inf for tokens that must not be sampled.
        uniform: [n] float64 in [0, 1).
    """
    # float64 is needed because the error of a float32 sum over a vocabulary exceeds the probability of rare tokens.
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    # If the logprobs are NaN, the index is past the end. Then the last token is chosen, and its logprob is NaN.
    return drawn.clamp_(max=logprobs.shape[1] - 1)


def install() -> None:
    """Replaces vLLM's sampler in this process. This function may be called several times.

    Our sampler is used in a step if all requests of the step have seeds and none of them uses top-k or top-p. In all
    other steps, the replacement calls vLLM's own sampler.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    for name in METHODS:
        original = getattr(TopKTopPSampler, name)
        if original.__module__ != __name__:
            setattr(TopKTopPSampler, name, _replacement(original))


def _replacement(original: Any) -> Any:
    def forward(
        self: Any, logits: Tensor, generators: Mapping[int, Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if len(generators) != len(logits) or k is not None or p is not None:
            return original(self, logits, generators, k, p)
        if self.logprobs_mode != "processed_logprobs":
            raise ValueError(f"logprobs_mode is {self.logprobs_mode!r}, but must be processed_logprobs")
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        uniform = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        for row, generator in generators.items():
            uniform[row].uniform_(generator=generator)
        return inverse_cdf(logprobs, uniform), logprobs

    return forward
