"""Attention over packed groups: each response sees its prompt and itself, and nothing else.

Registered with transformers as `packed_groups`, so that every decoder it ships runs on packed rows unchanged.
A prompt's keys and values stand in the row once, however many responses look at them. No [T, T] matrix is made:
on a CPU the visible pairs are a few dense or causal rectangles, merged by their log-sum-exp; on a GPU they are
a FlexAttention block mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

NAME = "packed_groups"
SMALL, ALIKE = 32, 0.75  # see `batches_of`


@dataclass(frozen=True)
class Span:
    """One group in a packed row, right after the one before it: a prompt, then its responses. In tokens."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Segments:
    """Some prompts or responses, each of which attends causally to itself: computed in one call, [n, L] tokens.

    `tokens` has their places in the row. Segments shorter than L end in repeats of their last token: causal
    attention hides what comes later from what comes earlier, so it is enough to drop the repeats' results, and to
    give them no gradient on the way back.
    """

    tokens: Tensor  # [n, L] int64
    real: Tensor | None  # [n, L] bool, False for repeats; None if there are none

    def take(self, x: Tensor) -> Tensor:
        """[T, ...] to [n, L, ...]. One segment alone is a view."""
        if len(self.tokens) == 1:
            start = int(self.tokens[0, 0])
            return x[start : start + self.tokens.shape[1]][None]
        return x[self.tokens]

    def take_gradient(self, x: Tensor) -> Tensor:
        """The same with 0 for repeats."""
        taken = self.take(x)
        return taken if self.real is None else taken.mul_(self.real[..., None, None])

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write [n, L, ...] to its tokens' places in [T, ...]."""
        if len(self.tokens) == 1:
            start = int(self.tokens[0, 0])
            x[start : start + self.tokens.shape[1]] = values[0]
        elif self.real is None:
            x[self.tokens] = values
        else:
            x[self.tokens[self.real]] = values[self.real]


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a packed row; made once per row and used by every layer."""

    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return sum(span.length for span in self.spans)

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first token, length) of every prompt and every response, in order."""
        start = 0
        for span in self.spans:
            for length in (span.prompt, *span.responses):
                if length:
                    yield start, length
                start += length

    @cached_property
    def causal(self) -> tuple[Segments, ...]:
        """Every segment, in batches of similar lengths."""
        return tuple(_segments(batch) for batch in batches_of(tuple(self.segments())))

    @cached_property
    def shared(self) -> tuple[tuple[slice, slice], ...]:
        """(responses, prompt) of every group: all of the first see all of the second."""
        found = []
        start = 0
        for span in self.spans:
            middle, end = start + span.prompt, start + span.length
            if start < middle < end:
                found.append((slice(middle, end), slice(start, middle)))
            start = end
        return tuple(found)

    @cached_property
    def owners(self) -> tuple[Tensor, Tensor]:
        """Of every token [T] int64: its group, and its response, numbered from 1 in the row; 0 in prompts."""
        groups: list[int] = []
        owners: list[int] = []
        response = 0
        for number, span in enumerate(self.spans):
            groups += [number] * span.length
            owners += [0] * span.prompt
            for length in span.responses:
                response += 1
                owners += [response] * length
        return torch.tensor(groups), torch.tensor(owners)

    @cached_property
    def block_masks(self) -> dict[torch.device, BlockMask]:
        """FlexAttention's form of it, by device; each made when first used."""
        return {}


def sees(group: Tensor, owner: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Whether token `row` sees token `column`, given `Layout.owners`: what every way to compute it must agree with."""
    shared = (owner[column] == 0) | (owner[row] == owner[column])
    return (column <= row) & (group[row] == group[column]) & shared


def batches_of(segments: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Segments (first token, length) in batches that are worth one call each, the longest first.

    A call has a price, and so has padding to the longest of a batch: segments of up to SMALL tokens go together,
    longer ones only if the shortest has at least ALIKE times the tokens of the longest.
    """
    batches: list[list[tuple[int, int]]] = []
    for segment in sorted(segments, key=lambda s: (-s[1], s[0])):
        longest = batches[-1][0][1] if batches else 0
        if batches and (longest <= SMALL or segment[1] >= ALIKE * longest):
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return batches


def _segments(batch: Sequence[tuple[int, int]]) -> Segments:
    starts, lengths = torch.tensor(batch).T[..., None]
    offsets = torch.arange(batch[0][1])
    real = offsets < lengths
    return Segments(starts + offsets.minimum(lengths - 1), None if real.all() else real)


def packed_groups(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, heads, T, D], key and value [1, kv_heads, T, D].

    Returns: [1, T, heads, D].
    """
    if query.device.type != "cpu":
        return flex_groups(query, key, value, layout, scaling).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out: Any = _GroupsOnCPU.apply(q, k, v, layout, scaling)
    return out[None], None


class _GroupsOnCPU(torch.autograd.Function):
    """[T, heads, D] in and out. torch's flash kernel for CPU, once per batch of segments and once per group for
    its responses before their prompt. The backward kernel works from the log-sum-exp over all that a token sees,
    so it may be called part by part, and the parts' gradients add up."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for part in layout.causal:
            o, norm = _flash(*(part.take(x) for x in (q, k, v)), causal=True, scale=scale)
            part.put(out, o)
            part.put(lse, norm)
        for responses, prompt in layout.shared:
            o, norm = _flash(q[None, responses], k[None, prompt], v[None, prompt], causal=False, scale=scale)
            own = lse[responses]
            out[responses].lerp_(o[0], (norm[0] - own).sigmoid_()[..., None].to(o.dtype))
            lse[responses] = own.logaddexp(norm[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        q, k, v, out, lse = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in ctx.layout.causal:
            given = (part.take(x) for x in (q, k, v, out, lse))
            found = _flash_backward(part.take_gradient(grad), *given, causal=True, scale=ctx.scale)
            for whole, one in zip(grads, found, strict=True):
                part.put(whole, one)
        for rows, prompt in ctx.layout.shared:
            of_responses = (x[None, rows] for x in (out, lse))
            seen = (x[None, prompt] for x in (k, v))
            dq, dk, dv = _flash_backward(
                grad[None, rows], q[None, rows], *seen, *of_responses, causal=False, scale=ctx.scale
            )
            grads[0][rows] += dq[0]
            grads[1][prompt] += dk[0]
            grads[2][prompt] += dv[0]
        return *grads, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[n, L, heads, D] each (k and v may have fewer heads). Returns the outputs alike and log-sum-exp [n, L, heads].

    The operator beneath scaled_dot_product_attention: no public function for CPUs gives the log-sum-exp, without
    which parts cannot be merged.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(*given: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k and v from the gradient of the outputs, q, k, v, the outputs and their log-sum-exp, each of
    them over all that a token sees."""
    heads_first = (x.transpose(1, 2) for x in given)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, causal, scale=scale)
    return tuple(x.transpose(1, 2) for x in found)


def flex_groups(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The same by FlexAttention, which is compiled to one kernel on a GPU. [1, heads, T, D] in and out."""
    device = query.device
    if (mask := layout.block_masks.get(device)) is None:
        group, owner = (x.to(device) for x in layout.owners)

        def visible(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return sees(group, owner, row, column)

        make = create_block_mask if device.type == "cpu" else _compiled(create_block_mask)
        mask = layout.block_masks[device] = make(visible, None, None, layout.length, layout.length, device=device)
    attend = flex_attention if device.type == "cpu" else _compiled(flex_attention)
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


AttentionInterface.register(NAME, packed_groups)
