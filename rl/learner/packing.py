"""Packs the groups of a batch into packed rows without padding. Policy and critic make one forward pass per packed row.

A packed row contains each prompt once, followed by its responses. The positions of every response continue after the
positions of its prompt.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl.learner.batch import Group
from rl.model.attention import Layout, Span


@dataclass(frozen=True)
class PackedRow:
    """The input of one forward pass: T tokens. Of these, n tokens belong to k responses. All other tokens belong to
    prompts.

    If `counts` is False, the results and the gradient of the packed row are ignored. Such packed rows are added so that
    all ranks make the same number of forward and backward passes.
    """

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [1, T] int64, or [3, T] for models with three positions per token
    image_slots: Tensor  # [T] bool; True on the prompt tokens that stand for a picture
    images: tuple[str, ...]  # digests of the pictures, in the order of their slots
    layout: Layout
    batch_rows: Tensor  # [k] int64; each response's row index in the batch
    before: Tensor  # [n] int64; index of the token whose hidden state predicts response token i
    targets: Tensor  # [n] int64; id of response token i
    response: Tensor  # [n] int64; number of the response that token i belongs to, 0 to k - 1
    column: Tensor  # [n] int64; index of token i in its response
    last: Tensor  # [k] int64; index of each response's last token
    counts: bool = True

    def padded(self, values: Tensor) -> Tensor:
        """Converts `values` [n], with one number per response token, to a tensor [k, longest], with one row per
        response. Shorter responses are padded with 0."""
        out = values.new_zeros(len(self.batch_rows), int(self.column.max()) + 1)
        return out.index_put((self.response.to(values.device), self.column.to(values.device)), values)

    def write_to(self, batch_tensor: Tensor, values: Tensor) -> None:
        """Writes the [k, longest] values of this packed row into a tensor of the batch, [N, R]."""
        batch_tensor[self.batch_rows[self.response], self.column] = values[self.response, self.column]

    def read_from(self, batch_tensor: Tensor) -> Tensor:
        """Returns the [k, longest] values of this packed row from a tensor of the batch, [N, R]."""
        return batch_tensor[self.batch_rows, : int(self.column.max()) + 1]


Positions = Callable[[Sequence[int], Sequence[tuple[int, int]]], tuple[Tensor, int]]
"""(prompt ids, sizes of the pictures) -> the positions of the prompt [1 or 3, P], and the first position after it. See
`Architecture.positions`."""


def text_positions(prompt_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
    """Returns the positions 0, 1, 2, ... of a prompt."""
    return torch.arange(len(prompt_ids))[None], len(prompt_ids)


def pack(
    groups: Sequence[Group], token_budget: int, image_token_id: int | None, positions: Positions = text_positions
) -> list[PackedRow]:
    """Packs groups into packed rows of at most `token_budget` tokens, by first-fit decreasing. The result is always the
    same for the same groups.

    A group larger than the budget is split between responses, and each part repeats the prompt.

    Raises: ValueError if a prompt with one response is larger than the budget.
    """
    rows = _first_fit(_split(groups, token_budget), token_budget)
    return [_packed_row(row, image_token_id, positions) for row in rows]


def rows_of_rank(
    groups: Sequence[Group],
    token_budget: int,
    image_token_id: int | None,
    positions: Positions = text_positions,
    *,
    rank: int,
    ranks: int,
    pairs_per_token: float,
) -> list[PackedRow]:
    """Returns the packed rows of one rank. All ranks get about the same work and the same number of packed rows.

    Args:
        pairs_per_token: the number of attention pairs that cost as much as all other work for one token.
    """
    parts = _split(groups, token_budget)
    shares = balanced([part.tokens + part.pairs / pairs_per_token for part in parts], ranks)
    rows = [_first_fit([parts[i] for i in share], token_budget) for share in shares]
    smallest = min((row for share in rows for row in share), key=lambda row: sum(part.tokens for part in row))
    missing = max(map(len, rows)) - len(rows[rank])
    filler = [replace(_packed_row(smallest, image_token_id, positions), counts=False)] * missing
    return [_packed_row(row, image_token_id, positions) for row in rows[rank]] + filler


def balanced(work: Sequence[float], parts: int) -> list[list[int]]:
    """Distributes the indices of `work` over lists with nearly equal sums of work. The number of lists is `parts`.

    Uses the largest differencing method (Karmarkar and Karp, 1982, section 6). At first, each index has a partition of
    its own. In this partition, one list contains the index, and the other lists are empty. Each step merges the two
    partitions in which the largest and the smallest list differ most. The largest list of one partition is merged with
    the smallest list of the other partition, the second largest with the second smallest, and so on. The method ends
    when only one partition remains.
    """
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for index, amount in enumerate(work):
        lists: list[tuple[float, list[int]]] = [(0.0, []) for _ in range(parts - 1)]
        heapq.heappush(heap, (-amount, index, [*lists, (amount, [index])]))
    while len(heap) > 1:
        (_, order, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(first, reversed(second), strict=True)
        merged = sorted(((a + b, [*x, *y]) for (a, x), (b, y) in pairs), key=lambda part: part[0])
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], order, merged))
    return [sorted(share) for _, share in heap[0][2]] if heap else [[] for _ in range(parts)]


def _first_fit(parts: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Puts each group, the longest group first, into the first packed row with enough room (first-fit decreasing)."""
    rows: list[list[Group]] = []
    room: list[int] = []
    for part in sorted(parts, key=lambda g: (-g.tokens, g.rows)):
        index = next((i for i, free in enumerate(room) if free >= part.tokens), None)
        if index is None:
            rows.append([])
            room.append(token_budget)
            index = len(rows) - 1
        rows[index].append(part)
        room[index] -= part.tokens
    return rows


def _split(groups: Sequence[Group], token_budget: int) -> list[Group]:
    """Splits each group of more than `token_budget` tokens between responses. Smaller groups are returned unchanged."""
    return [part for group in groups for part in _split_group(group, token_budget)]


def _split_group(group: Group, token_budget: int) -> list[Group]:
    parts: list[list[int]] = [[]]
    used = prompt = len(group.prompt_ids)
    for index, response in enumerate(group.responses):
        if prompt + len(response) > token_budget:
            raise ValueError(
                f"a prompt of {prompt} tokens with a response of {len(response)} is larger than learner.token_budget "
                f"{token_budget}; set learner.token_budget to at least max_sequence_length"
            )
        if used + len(response) > token_budget:
            parts.append([])
            used = prompt
        parts[-1].append(index)
        used += len(response)
    return [group.only(part) for part in parts if part]


def _packed_row(groups: Sequence[Group], image_token_id: int | None, positions: Positions) -> PackedRow:
    ids: list[int] = []
    places: list[Tensor] = []
    slots: list[bool] = []
    spans: list[Span] = []
    before: list[int] = []
    responses: list[int] = []
    columns: list[int] = []
    last: list[int] = []
    for group in groups:
        start, prompt = len(ids), len(group.prompt_ids)
        spans.append(Span(prompt, tuple(map(len, group.responses))))
        ids += group.prompt_ids
        of_prompt, following = positions(group.prompt_ids, group.sizes)
        places.append(of_prompt)
        slots += [token == image_token_id for token in group.prompt_ids]
        for response in group.responses:
            first = len(ids)
            before += [start + prompt - 1, *range(first, first + len(response) - 1)]
            responses += [len(last)] * len(response)
            columns += range(len(response))
            ids += response
            places.append(torch.arange(following, following + len(response)).expand(len(of_prompt), -1))
            slots += [False] * len(response)
            last.append(len(ids) - 1)
    targets = [t for group in groups for response in group.responses for t in response]
    return PackedRow(
        token_ids=torch.tensor(ids),
        position_ids=torch.cat(places, -1),
        image_slots=torch.tensor(slots),
        images=tuple(digest for group in groups for digest in group.images),
        layout=Layout(tuple(spans)),
        batch_rows=torch.tensor([row for group in groups for row in group.rows]),
        before=torch.tensor(before),
        targets=torch.tensor(targets),
        response=torch.tensor(responses),
        column=torch.tensor(columns),
        last=torch.tensor(last),
    )
