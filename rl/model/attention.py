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
    """One group in a packed row: a prompt of P tokens, then its responses, one after the other."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.responses)

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
    outputs = []
    for span in spans:
        own = slice(span.start, span.end)
        mask = span.mask.to(query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own], key[:, :, own], value[:, :, own], attn_mask=mask, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, packed_groups)
