"""Attention over packed groups: each response sees its prompt and its own tokens, and nothing else.

The function `packed_groups` is registered with transformers. The decoders of transformers can then run on packed rows
without any change. The keys and values of a prompt are computed once for all its responses. No matrix of size [T, T] is
allocated. A (query, key) pair is visible if the query token sees the key token. On a CPU, the visible pairs are divided
into a few blocks, each with full or causal attention. Attention is computed for each block, and the log-sum-exp of each
result is used to merge the results. On a GPU, a FlexAttention block mask describes the visible pairs.
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
SMALL, ALIKE = 32, 0.75  # explained in `batches_of`


@dataclass(frozen=True)
class Span:
    """The lengths of a prompt and of its responses in a packed row, in tokens. A packed row has no gaps between
    groups."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Segments:
    """A batch of n segments of up to L tokens. A segment is a prompt or a response. One call computes the causal
    self-attention of all segments of the batch.

    Segments shorter than L are padded with repeats of their last token. Attention is causal, so the real tokens do not
    see the repeats. The results of the repeats are dropped, and the gradient of these results is set to 0 in the
    backward pass.
    """

    tokens: Tensor  # [n, L] int64, indices of the tokens in the packed row
    real: Tensor | None  # [n, L] bool, False for repeats; None if there are no repeats

    def take(self, x: Tensor) -> Tensor:
        """Returns the entries of `x` [T, ...] for the segments' tokens, as [n, L, ...]. If there is only one segment,
        the result is a view of `x`."""
        if len(self.tokens) == 1:
            start = int(self.tokens[0, 0])
            return x[start : start + self.tokens.shape[1]][None]
        return x[self.tokens]

    def take_gradient(self, x: Tensor) -> Tensor:
        """Calls `take` and sets the entries of the repeats to 0 in the result."""
        taken = self.take(x)
        return taken if self.real is None else taken.mul_(self.real[..., None, None])

    def put(self, x: Tensor, values: Tensor) -> None:
        """Writes `values` [n, L, ...] into `x` [T, ...] at the indices of the segments' tokens."""
        if len(self.tokens) == 1:
            start = int(self.tokens[0, 0])
            x[start : start + self.tokens.shape[1]] = values[0]
        elif self.real is None:
            x[self.tokens] = values
        else:
            x[self.tokens[self.real]] = values[self.real]


@dataclass(frozen=True)
class Layout:
    """Defines which tokens of a packed row each token sees. One Layout is made per packed row, and all layers use
    it."""

    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return sum(span.length for span in self.spans)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Yields (index of the first token, length) of every prompt and every response, in order."""
        start = 0
        for span in self.spans:
            for length in (span.prompt, *span.responses):
                if length:
                    yield start, length
                start += length

    @cached_property
    def causal(self) -> tuple[Segments, ...]:
        """All segments, in batches of similar lengths."""
        return tuple(_segments(batch) for batch in batches_of(tuple(self.segments())))

    @cached_property
    def shared(self) -> tuple[tuple[slice, slice], ...]:
        """For every group: (slice of all response tokens, slice of the prompt tokens). Each response token sees all
        prompt tokens of its group."""
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
        """Two [T] int64 tensors. The first gives the group number of each token. The second gives the response number
        of each token, counted from 1 over the whole packed row, or 0 for prompt tokens."""
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
        """FlexAttention's block mask for each device. A mask is made when it is first used."""
        return {}


def sees(group: Tensor, owner: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """True where the token with index `row` sees the token with index `column`. `group` and `owner` are the two tensors
    of `Layout.owners`.

    All implementations of attention must agree with this function.
    """
    shared = (owner[column] == 0) | (owner[row] == owner[column])
    return (column <= row) & (group[row] == group[column]) & shared


def batches_of(segments: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Distributes segments (first token, length) to batches, the longest segments first. Each batch is computed in one
    call.

    With fewer batches, fewer calls are needed. But all segments of a batch are padded to the length of its longest
    segment, so fewer batches also mean more padding. If the longest segment of a batch has at most SMALL tokens, the
    batch takes all shorter segments. Otherwise, the batch takes only segments that are almost as long as the longest
    segment: their length must be at least ALIKE (0.75) times the length of the longest segment.
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
    """Computes attention over packed groups, with the signature that transformers expects of an attention function.

    Args:
        query: [1, heads, T, D].
        key, value: [1, kv_heads, T, D].
    Returns: the outputs [1, T, heads, D], and None in place of attention weights.
    """
    # Under autocast, the rotary positions make queries and keys float32, but values stay bfloat16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type != "cpu":
        return flex_groups(query, key, value, layout, scaling).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out: Any = _GroupsOnCPU.apply(q, k, v, layout, scaling)
    return out[None], None


class _GroupsOnCPU(torch.autograd.Function):
    """Attention on a CPU; inputs and outputs are [T, heads, D].

    The forward pass calls torch's flash kernel for CPUs once for each batch of segments. It also calls the kernel once
    for each group, for the attention of the responses to their prompt. For each token, the backward kernel gets the
    log-sum-exp over all tokens that this token sees. So the backward pass can call the kernel separately for each batch
    of segments and for each group, and add the gradients.
    """

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
    """Returns the attention outputs [n, L, heads, D] and their log-sum-exp [n, L, heads].

    q, k and v are [n, L, heads, D]; k and v may have fewer heads than q. The function calls a private operator of
    torch, because no public function for CPUs returns the log-sum-exp. scaled_dot_product_attention uses the same
    operator.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(*given: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Returns the gradients of q, k and v.

    `given` has six tensors: the gradient of the outputs, q, k, v, the outputs, and the log-sum-exp of the outputs. k
    and v may contain only some of the tokens that a query token sees. But the outputs and the log-sum-exp must come
    from attention to all tokens that the query token sees.
    """
    heads_first = (x.transpose(1, 2) for x in given)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, causal, scale=scale)
    return tuple(x.transpose(1, 2) for x in found)


def flex_groups(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Computes attention over packed groups with FlexAttention, which is compiled to one kernel on a GPU.

    Inputs and outputs are [1, heads, T, D].
    """
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
