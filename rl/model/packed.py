"""A decoder on packed rows: from tokens and frozen picture features to hidden states and logprobs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rl.learner.packing import PackedRow
from rl.model.logprobs import token_logprobs


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


def hidden_states(trunk: Any, row: PackedRow, features: Mapping[str, Tensor]) -> Tensor:
    """Run the decoder trunk over one packed row: [T, hidden]."""
    words = trunk.get_input_embeddings()
    device = words.weight.device
    inputs = embed(
        words,
        row.token_ids.to(device),
        row.image_slots.to(device),
        [features[digest].to(device) for digest in row.images],
    )
    positions = row.position_ids.to(device)[None]
    out = trunk(inputs_embeds=inputs[None], position_ids=positions, use_cache=False, layout=row.layout)
    return out.last_hidden_state[0]


def recompute_layers(trunk: Any) -> None:
    """Keep only the layers' inputs for the backward pass and compute the rest again there."""
    trunk.gradient_checkpointing_enable({"use_reentrant": False})
    trunk.train()  # transformers recomputes in training mode only; these decoders have no dropout


def pairs_per_token(config: PretrainedConfig) -> float:
    """How many pairs of tokens attention compares for the price of one token in the linear layers: by floating-point
    operations, 2 per weight and token, 4 per channel of the query heads and pair."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head
    attention = config.hidden_size * (2 * width + 2 * config.num_key_value_heads * head)
    return (attention + 3 * config.hidden_size * config.intermediate_size) / (2 * width)


class PolicyModel(nn.Module):
    """A decoder trunk and its head, the trained part of an architecture; tensor names as on disk."""

    def __init__(self, trunk: Any, head: nn.Linear) -> None:
        super().__init__()
        self.model = trunk
        self.lm_head = head

    def forward(self, row: PackedRow, features: Mapping[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies of a packed row's response tokens, [n] each, float32 nats."""
        hidden = hidden_states(self.model, row, features)
        return token_logprobs(hidden[row.before.to(hidden.device)], self.lm_head.weight, row.targets, temperature)
