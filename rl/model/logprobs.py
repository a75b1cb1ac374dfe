"""Computes logprobs and entropies of given tokens without a [tokens, vocabulary] matrix in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl.types import NEVER_BIAS

# LOGITS: the maximum number of logits that are in memory at a time (16 MiB in float32). LEAST: the logits of at least
# this number of tokens are computed at a time. This minimum takes precedence over LOGITS.
LOGITS, LEAST = 1 << 22, 256


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, never: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Returns the logprob of each target token, and the entropy of the distribution from which the token is drawn, in
    nats.

    Logits are computed for a few tokens at a time, and are computed again in the backward pass. After the matrix
    product, everything is computed in float32, because bfloat16 would round a logprob of -12 by up to 0.03. The
    gradient of `head` is accumulated in one tensor.

    Args:
        hidden: [n, hidden], the hidden states that predict the targets.
        head: [vocabulary, hidden], the output matrix.
        targets: [n] int64.
        temperature: the logits are divided by this number, as in the engine's sampling.
        never: ids of tokens that are never sampled. NEVER_BIAS is added to their logits, as in the engine.
    Returns: logprobs [n], entropies [n]; float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # autocast has no effect inside a torch.autograd.Function, so we cast here
        hidden, head = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, head))
    found: Any = _TokenLogprobs.apply(hidden, head, targets.to(hidden.device), temperature, list(never))
    return found


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, never: list[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.never, ctx.size = temperature, never, max(LEAST, LOGITS // len(head))
        logprobs, entropies, norms = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        for part in _parts(len(hidden), ctx.size):
            logits = _logits(hidden[part], head, temperature, never)
            norms[part] = logits.logsumexp(-1)
            logs = logits.sub_(norms[part, None])
            logprobs[part] = logs.gather(-1, targets[part, None])[:, 0]
            entropies[part] = -logs.exp().mul_(logs).sum(-1)
        ctx.save_for_backward(hidden, head, targets, norms, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Uses d logprob / d logit_j = [j = target] - p_j and d entropy / d logit_j = -p_j (log p_j + entropy).

        [j = target] is 1 if j is the target token, and 0 otherwise. p_j is the probability of token j.
        """
        for_logprobs, for_entropies = grad_outputs
        hidden, head, targets, norms, entropies = ctx.saved_tensors
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        uses_entropy = bool(for_entropies.any())
        for part in _parts(len(hidden), ctx.size):
            logs = _logits(hidden[part], head, ctx.temperature, ctx.never).sub_(norms[part, None])
            chances = logs.exp()
            if uses_entropy:
                factor = logs.add_(entropies[part, None]).mul_(for_entropies[part, None]).add_(for_logprobs[part, None])
                d_logits = chances.mul_(factor).neg_()
            else:
                d_logits = chances.mul_(-for_logprobs[part, None])
            d_logits.scatter_add_(-1, targets[part, None], for_logprobs[part, None])
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            d_hidden[part] = d_logits @ head
            if head.dtype == torch.float32:
                d_head.addmm_(d_logits.T, hidden[part])
            else:
                d_head += d_logits.T @ hidden[part]
        return d_hidden, d_head.to(head.dtype), None, None, None


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _logits(hidden: Tensor, head: Tensor, temperature: float, never: list[int]) -> Tensor:
    logits = (hidden @ head.T).float()
    if never:
        logits[:, never] += NEVER_BIAS
    return logits if temperature == 1.0 else logits.div_(temperature)
