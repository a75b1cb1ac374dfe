"""Scored rollouts to what the learner computes on: groups, minibatches and packed rows. Nothing is padded.

A group is one prompt with its responses. In a packed row the prompt stands once, then each response, and every
response's positions continue the prompt's. [N, R] tensors (N responses, R the longest) hold one number per
response token; column t always describes response token t.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl.algorithm.gae import terminal_rewards
from rl.model.attention import Layout, Span
from rl.types import Scored


@dataclass(frozen=True)
class Group:
    """One prompt of P tokens and some of its responses; `rows` says which rows of the batch they are."""

    prompt_ids: tuple[int, ...]  # [P], image slots expanded
    images: tuple[str, ...]  # digests, in prompt order
    responses: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def pairs(self) -> int:
        """Tokens that attention compares, over all tokens."""
        prompt = len(self.prompt_ids)
        return _triangle(prompt) + sum(prompt * len(r) + _triangle(len(r)) for r in self.responses)


@dataclass(frozen=True)
class Batch:
    """All valid samples of an iteration. Every tensor is [N, R] except `truncated`, [N]."""

    groups: tuple[Group, ...]
    response_mask: Tensor  # bool; True where the policy chose the token
    rollout_logprobs: Tensor  # float32 nats, from the engine; 0 outside the mask
    rewards: Tensor  # float32; the whole reward on the last response token
    truncated: Tensor  # bool; the response ended because its length did

    def __post_init__(self) -> None:
        shape = tuple(self.response_mask.shape)
        for name in ("rollout_logprobs", "rewards"):
            if (got := tuple(getattr(self, name).shape)) != shape:
                raise ValueError(f"Batch.{name} is {got} but response_mask is {shape}; make batches with collate()")


@dataclass(frozen=True)
class Pack:
    """One forward pass: T tokens in a row, n of them response tokens."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    image_slots: Tensor  # [T] bool; True where the prompt shows a picture
    images: tuple[str, ...]  # digests, in order of their slots
    layout: Layout
    rows: Tensor  # [k] int64; the batch rows of the k responses
    before: Tensor  # [n] int64; index of the token whose hidden state predicts response token i
    targets: Tensor  # [n] int64; that response token
    row: Tensor  # [n] int64; its response, 0 to k - 1
    column: Tensor  # [n] int64; its place in the response
    last: Tensor  # [k] int64; index of each response's last token

    def padded(self, values: Tensor) -> Tensor:
        """One number per response token, [n], to a row per response, [k, longest]; 0 elsewhere."""
        out = values.new_zeros(len(self.rows), int(self.column.max()) + 1)
        return out.index_put((self.row.to(values.device), self.column.to(values.device)), values)

    def put(self, full: Tensor, values: Tensor) -> None:
        """Write this row's [k, longest] into a batch tensor [N, R]."""
        full[self.rows[self.row], self.column] = values[self.row, self.column]

    def part(self, full: Tensor) -> Tensor:
        """This row's share, [k, longest], of a batch tensor [N, R]."""
        return full[self.rows, : int(self.column.max()) + 1]


@dataclass(frozen=True)
class PackedRow:
    """A packed row that a rank computes. One that does not `counts` only keeps the ranks in step: its results and its
    gradient are thrown away."""

    pack: Pack
    counts: bool = True


def collate(scored: Sequence[Scored]) -> Batch:
    """Valid samples to a Batch; neighbours with the same prompt id form a group. Raises ValueError if none is valid."""
    valid = [s for s in scored if s.invalid is None and s.rollout.response_ids]
    if not valid:
        raise ValueError("no sample of this iteration is valid, so there is nothing to learn from")
    rollouts = [s.rollout for s in valid]
    width = max(len(r.response_ids) for r in rollouts)
    mask = torch.zeros(len(valid), width, dtype=torch.bool)
    logprobs = torch.zeros(len(valid), width)
    for row, rollout in enumerate(rollouts):
        mask[row, : len(rollout.response_ids)] = True
        logprobs[row, : len(rollout.response_ids)] = torch.tensor(rollout.rollout_logprobs)
    return Batch(
        groups=tuple(_groups(valid)),
        response_mask=mask,
        rollout_logprobs=logprobs,
        rewards=terminal_rewards(torch.tensor([s.reward for s in valid]), mask),
        truncated=torch.tensor([r.finish == "length" for r in rollouts]),
    )


def _groups(valid: Sequence[Scored]) -> list[Group]:
    members: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for row, s in enumerate(valid):
        members.setdefault((s.rollout.prompt.id, s.rollout.prompt_ids), []).append(row)
    return [
        Group(
            prompt_ids,
            tuple(p.digest for p in valid[rows[0]].rollout.prompt.images),
            tuple(valid[row].rollout.response_ids for row in rows),
            tuple(rows),
        )
        for (_, prompt_ids), rows in members.items()
    ]


def minibatches(groups: Sequence[Group], count: int, seed: str) -> list[list[Group]]:
    """Deal groups, shuffled by `seed`, into `count` minibatches of nearly equal response counts.

    Groups stay whole, so that a prompt is computed once per group, unless there are fewer of them than
    minibatches; then the largest are halved. Fewer responses than minibatches leave fewer minibatches.
    """
    order = list(groups)
    random.Random(seed).shuffle(order)
    while len(order) < count and (largest := max(order, key=lambda g: len(g.rows))) and len(largest.rows) > 1:
        place, half = order.index(largest), len(largest.rows) // 2
        order[place : place + 1] = [
            _some(largest, range(half)),
            _some(largest, range(half, len(largest.rows))),
        ]
    dealt: list[list[Group]] = [[] for _ in range(min(count, len(order)))]
    for group in order:
        min(dealt, key=lambda part: sum(len(g.rows) for g in part)).append(group)
    return dealt


def _some(group: Group, which: Sequence[int]) -> Group:
    """The group with only the responses at the indices `which`."""
    return replace(
        group,
        responses=tuple(group.responses[i] for i in which),
        rows=tuple(group.rows[i] for i in which),
    )


def pack(groups: Sequence[Group], token_budget: int, image_token_id: int | None) -> list[Pack]:
    """First-fit decreasing: as few rows of at most `token_budget` tokens as that finds, in a fixed order.

    A group over the budget is split between responses and repeats its prompt. Raises ValueError if a prompt with
    one response is over it.
    """
    pieces = [piece for group in groups for piece in _split(group, token_budget)]
    bins: list[list[Group]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda g: (-g.tokens, g.rows)):
        slot = next((i for i, free in enumerate(room) if free >= piece.tokens), None)
        if slot is None:
            bins.append([])
            room.append(token_budget)
            slot = len(bins) - 1
        bins[slot].append(piece)
        room[slot] -= piece.tokens
    return [_row(part, image_token_id) for part in bins]


def rows_of_rank(
    groups: Sequence[Group],
    token_budget: int,
    image_token_id: int | None,
    *,
    rank: int,
    ranks: int,
    pairs_per_token: float,
) -> list[PackedRow]:
    """The packed rows that are this rank's to compute: about the same work for each rank, and as many rows.

    Args:
        pairs_per_token: how many pairs of tokens that attention compares cost as much as all the rest of a token.
    """
    pieces = [piece for group in groups for piece in _split(group, token_budget)]
    shares = balanced([piece.tokens + piece.pairs / pairs_per_token for piece in pieces], ranks)
    packs = [pack([pieces[i] for i in share], token_budget, image_token_id) for share in shares]
    smallest = min((row for share in packs for row in share), key=lambda row: len(row.token_ids))
    missing = max(map(len, packs)) - len(packs[rank])
    return [*map(PackedRow, packs[rank]), *[PackedRow(smallest, counts=False)] * missing]


def balanced(work: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `work` in `parts` lists of nearly equal sums.

    The largest differencing method (Karmarkar and Karp, 1982, section 6) for several parts: the two partitions whose
    sums differ most inside are merged, the largest list of one with the smallest of the other, until one is left.
    """
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for index, amount in enumerate(work):
        lists: list[tuple[float, list[int]]] = [(0.0, []) for _ in range(parts - 1)]
        heapq.heappush(heap, (-amount, index, [*lists, (amount, [index])]))
    while len(heap) > 1:
        (_, order, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(one, reversed(other), strict=True)
        merged = sorted(((a + b, [*x, *y]) for (a, x), (b, y) in pairs), key=lambda part: part[0])
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], order, merged))
    return [sorted(share) for _, share in heap[0][2]] if heap else [[] for _ in range(parts)]


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _split(group: Group, token_budget: int) -> list[Group]:
    parts: list[list[int]] = [[]]
    used = prompt = len(group.prompt_ids)
    for index, response in enumerate(group.responses):
        if prompt + len(response) > token_budget:
            raise ValueError(
                f"a prompt of {prompt} tokens with a response of {len(response)} does not fit learner.token_budget "
                f"{token_budget}; make it at least max_sequence_length"
            )
        if used + len(response) > token_budget:
            parts.append([])
            used = prompt
        parts[-1].append(index)
        used += len(response)
    return [_some(group, part) for part in parts if part]


def _row(groups: Sequence[Group], image_token_id: int | None) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[bool] = []
    spans: list[Span] = []
    before: list[int] = []
    row: list[int] = []
    column: list[int] = []
    last: list[int] = []
    for group in groups:
        start, prompt = len(ids), len(group.prompt_ids)
        spans.append(Span(prompt, tuple(map(len, group.responses))))
        ids += group.prompt_ids
        positions += range(prompt)
        slots += [token == image_token_id for token in group.prompt_ids]
        for response in group.responses:
            first = len(ids)
            before += [start + prompt - 1, *range(first, first + len(response) - 1)]
            row += [len(last)] * len(response)
            column += range(len(response))
            ids += response
            positions += range(prompt, prompt + len(response))
            slots += [False] * len(response)
            last.append(len(ids) - 1)
    targets = [t for group in groups for response in group.responses for t in response]
    return Pack(
        token_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        image_slots=torch.tensor(slots),
        images=tuple(digest for group in groups for digest in group.images),
        layout=Layout(tuple(spans)),
        rows=torch.tensor([row for group in groups for row in group.rows]),
        before=torch.tensor(before),
        targets=torch.tensor(targets),
        row=torch.tensor(row),
        column=torch.tensor(column),
        last=torch.tensor(last),
    )
