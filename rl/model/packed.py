"""Runs a decoder on packed rows. Converts tokens and picture features to hidden states and logprobs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rl.learner.packing import PackedRow
from rl.model.logprobs import token_logprobs


def embed(words: nn.Embedding, token_ids: Tensor, image_slots: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Returns the decoder's inputs: the embedding of each token. At the image slots, the rows of `features` replace the
    embeddings, in order.

    Args:
        token_ids: [T] int64. An image token that is not in a slot was sampled by the policy. Such a token is embedded
            like a word.
        image_slots: [T] bool, True on the prompt tokens that stand for a picture.
        features: [image tokens, hidden] for each picture.
    Returns: [T, hidden].
    Raises: ValueError if the number of image slots differs from the number of features.
    """
    embedded = words(token_ids)
    slots, count = int(image_slots.sum()), sum(len(f) for f in features)
    if slots != count:
        raise ValueError(f"the prompts have {slots} image slots but the pictures give {count} features")
    if not count:
        return embedded
    return embedded.masked_scatter(image_slots[:, None], torch.cat(list(features)).to(embedded.dtype))


def hidden_states(trunk: Any, row: PackedRow, features: Mapping[str, Tensor]) -> Tensor:
    """Returns the last hidden states of the decoder trunk for one packed row, [T, hidden]."""
    words = trunk.get_input_embeddings()
    device = words.weight.device
    slots = row.image_slots.to(device)
    shown = [features[digest].to(device) for digest in row.images]
    width = words.embedding_dim
    inputs = embed(words, row.token_ids.to(device), slots, [one[:, :width] for one in shown])
    more: dict[str, Any] = {}
    if shown and shown[0].shape[1] > width:  # the features of deepstack layers lie behind the features of the picture
        levels = torch.cat(shown)[:, width:].to(inputs.dtype).split(width, -1)
        more = {"visual_pos_masks": slots[None], "deepstack_visual_embeds": list(levels)}
    positions = row.position_ids.to(device)
    if len(positions) > 1:
        positions = positions[:, None]
    out = trunk(inputs_embeds=inputs[None], position_ids=positions, use_cache=False, layout=row.layout, **more)
    return out.last_hidden_state[0]


def recompute_layers(trunk: Any) -> None:
    """Changes the trunk so that a forward pass keeps only the inputs of the layers. All other activations are computed
    again in the backward pass."""
    trunk.gradient_checkpointing_enable({"use_reentrant": False})
    trunk.train()  # transformers recomputes only in training mode; without dropout, this mode changes nothing else


def pairs_per_token(config: PretrainedConfig) -> float:
    """Returns the number of (query, key) pairs whose attention costs as much as the linear layers cost for one token.

    The cost is counted in floating-point operations. A token costs 2 operations per weight of the linear layers. A pair
    costs 4 operations per channel of the query heads.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head
    attention = config.hidden_size * (2 * width + 2 * config.num_key_value_heads * head)
    return (attention + 3 * config.hidden_size * config.intermediate_size) / (2 * width)


class PolicyModel(nn.Module):
    """The trained part of a model: its decoder trunk and its head. Parameters have the same names as the tensors on
    disk."""

    def __init__(self, trunk: Any, head: nn.Linear, never: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = trunk
        self.lm_head = head
        self.never = tuple(never)  # ids of tokens that are never sampled

    def forward(self, row: PackedRow, features: Mapping[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Returns the logprobs and the entropies of the response tokens of a packed row. Both are [n], float32 nats."""
        hidden = hidden_states(self.model, row, features)
        before = hidden[row.before.to(hidden.device)]
        return token_logprobs(before, self.lm_head.weight, row.targets, temperature, self.never)
