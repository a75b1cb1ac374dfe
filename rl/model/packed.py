"""A decoder on packed rows: from tokens and frozen picture features to hidden states, logprobs and entropies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl.packing import Pack

CHUNK = 1024  # tokens whose logits exist at the same time


def embed(words: nn.Embedding, token_ids: Tensor, image_slots: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Decoder inputs: word embeddings, with `features` in the slots of the pictures, in order.

    Args:
        token_ids: [T] int64. An image token that the policy sampled itself is a word like any other.
        image_slots: [T] bool, True where the prompt shows a picture.
        features: per picture [image tokens, hidden].
    Returns: [T, hidden].
    Raises: ValueError if slots and features do not match in number.
    """
    embedded = words(token_ids)
    slots, given = int(image_slots.sum()), sum(len(f) for f in features)
    if slots != given:
        raise ValueError(f"the prompts have {slots} image slots but the pictures give {given} features")
    if not given:
        return embedded
    return embedded.masked_scatter(image_slots[:, None], torch.cat(list(features)).to(embedded.dtype))


def hidden_states(trunk: Any, pack: Pack, features: Mapping[str, Tensor]) -> Tensor:
    """Run the decoder trunk over one packed row: [T, hidden]."""
    words = trunk.get_input_embeddings()
    device = words.weight.device
    inputs = embed(
        words,
        pack.token_ids.to(device),
        pack.image_slots.to(device),
        [features[digest].to(device) for digest in pack.images],
    )
    positions = pack.position_ids.to(device)[None]
    out = trunk(inputs_embeds=inputs[None], position_ids=positions, use_cache=False, layout=pack.layout)
    return out.last_hidden_state[0]


def token_logprobs(hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution, in nats.

    Logits are made for CHUNK tokens at a time, and again in the backward pass, so that no [n, vocabulary] matrix is
    ever held.

    Args:
        hidden: [n, hidden], the states that predict the targets.
        targets: [n] int64.
        temperature: logits are divided by it, as the engine did while sampling.
    Returns: logprobs [n], entropies [n]; float32.
    """
    parts = [
        checkpoint(_chunk, h, head.weight, head.bias, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.to(hidden.device).split(CHUNK), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = nn.functional.linear(hidden, weight, bias).float() / temperature
    logprobs = logits.log_softmax(-1)  # float32: bfloat16 would round a logprob of -12 by up to 0.03
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy
