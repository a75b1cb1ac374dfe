"""Turns scored rollouts into the batch of an iteration, and splits the batch into groups and minibatches.

A group is one prompt with its responses. A batch has N responses, and the longest response has R tokens. An [N, R]
tensor holds one number per response token: column t describes token t of the response. Shorter responses are padded
with 0.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl.algorithm.gae import terminal_rewards
from rl.types import Scored


@dataclass(frozen=True)
class Group:
    """One prompt of P tokens and some of its responses. `rows[i]` is the row of response i in the batch."""

    prompt_ids: tuple[int, ...]  # [P], with all image tokens of each picture
    images: tuple[str, ...]  # digests of the pictures, in prompt order
    responses: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of the pictures, in pixels

    @property
    def tokens(self) -> int:
        """The number of tokens in the prompt and all responses together."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs of tokens that attention computes for the group."""
        prompt = len(self.prompt_ids)
        return _causal_pairs(prompt) + sum(prompt * len(r) + _causal_pairs(len(r)) for r in self.responses)

    def only(self, indices: Sequence[int]) -> "Group":
        """Returns the group with only the responses at `indices`."""
        responses, rows = (tuple(items[i] for i in indices) for items in (self.responses, self.rows))
        return replace(self, responses=responses, rows=rows)


@dataclass(frozen=True)
class Batch:
    """All valid samples of an iteration. `truncated` is [N]; every other tensor is [N, R]."""

    groups: tuple[Group, ...]
    response_mask: Tensor  # bool; True on response tokens (all sampled by the policy), False on padding
    rollout_logprobs: Tensor  # float32 nats, from the engine; 0 outside the mask
    rewards: Tensor  # float32; the last response token has the whole reward, all other tokens have 0
    truncated: Tensor  # bool; True if the response was cut at the length limit

    def __post_init__(self) -> None:
        shape = tuple(self.response_mask.shape)
        for name in ("rollout_logprobs", "rewards"):
            if (got := tuple(getattr(self, name).shape)) != shape:
                raise ValueError(
                    f"Batch.{name} has shape {got}, but response_mask has {shape}; make batches with collate()"
                )


def collate(scored: Sequence[Scored]) -> Batch:
    """Returns the Batch of the valid samples. Samples with the same prompt id and prompt tokens form a group.

    Raises: ValueError if no sample is valid.
    """
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
            tuple(p.size for p in valid[rows[0]].rollout.prompt.images),
        )
        for (_, prompt_ids), rows in members.items()
    ]


def minibatches(groups: Sequence[Group], count: int, seed: str) -> list[list[Group]]:
    """Shuffles the groups with `seed` and distributes them to minibatches with similar numbers of responses. `count` is
    the number of minibatches.

    Groups are not split, so that each prompt is computed only once. But if there are fewer groups than minibatches, the
    largest groups are split in half. If there are fewer responses than minibatches, fewer minibatches are returned.
    """
    order = list(groups)
    random.Random(seed).shuffle(order)
    while len(order) < count and (largest := max(order, key=lambda g: len(g.rows))) and len(largest.rows) > 1:
        place, half = order.index(largest), len(largest.rows) // 2
        order[place : place + 1] = [largest.only(range(half)), largest.only(range(half, len(largest.rows)))]
    result: list[list[Group]] = [[] for _ in range(min(count, len(order)))]
    for group in order:
        min(result, key=lambda minibatch: sum(len(g.rows) for g in minibatch)).append(group)
    return result


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2
