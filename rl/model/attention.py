"""Attention over packed groups: each response sees its prompt and itself, and nothing else.

Registered with transformers as `packed_groups`, so that every decoder it ships runs on packed rows unchanged.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "packed_groups"


@dataclass(frozen=True)
class Span:
    """One group in a packed row, right after the one before it: a prompt, then its responses. In tokens."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.responses)

    @cached_property
    def mask(self) -> Tensor:
        """[L, L] bool over the group's own tokens: True where the row's token may look at the column's."""
        owner = torch.repeat_interleave(
            torch.arange(len(self.responses) + 1), torch.tensor([self.prompt, *self.responses])
        )
        visible = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
        return visible & torch.ones_like(visible).tril()


def packed_groups(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    spans: tuple[Span, ...],
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, heads, T, D], key and value [1, kv_heads, T, D].

    The mask of a group is quadratic in its length, so `learner.token_budget` bounds the memory.
    Returns: [1, T, heads, D].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    lengths = [span.length for span in spans]  # split, not slices: its backward is one concatenation
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask.to(q.device), scale=scaling)
        for span, q, k, v in zip(spans, *(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, packed_groups)
