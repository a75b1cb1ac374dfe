"""Partial rollouts: sampling stops when enough groups are complete, and unfinished responses continue later.

More prompts are in progress than an iteration needs. Sampling works in steps. In each step, every unfinished response
grows by up to `chunk` tokens. When enough groups are complete, these groups are the iteration's samples. All other
groups are kept for the next iteration. So the longest responses do not delay an iteration. Every token keeps the
logprob that it had under the weights that sampled it. A repeated run with the same recipe and seed selects the same
groups, because sampling stops after a certain number of tokens, not after a certain time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from rl.types import Completion, Finish, Prompt, Request, Rollout
from rollout.pool import EnginePool, in_order


@dataclass(frozen=True)
class Draft:
    """One response, which may be unfinished. It consists of pieces: the same weights sampled all tokens of a piece."""

    response_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()  # (policy_step, number of tokens) of each piece, in order
    prompt_ids: tuple[int, ...] = ()  # with all image tokens of each picture; empty before the first piece
    finish: Finish | None = None  # None: unfinished
    unusable: str = ""  # see Completion

    def extended(self, completion: Completion, policy_step: int, room: int) -> Self:
        """Returns the draft with the completion's tokens added. `room` is the maximum number of tokens of the whole
        response."""
        ids = self.response_ids + completion.response_ids
        ended = completion.finish == "stop" or len(ids) >= room
        return replace(
            self,
            response_ids=ids,
            logprobs=self.logprobs + completion.logprobs,
            pieces=_with_piece(self.pieces, (policy_step, len(completion.response_ids))),
            prompt_ids=self.prompt_ids or completion.prompt_ids,
            finish=completion.finish if ended else None,
            unusable=completion.unusable,
        )


@dataclass(frozen=True)
class DraftGroup:
    """A prompt and its responses, some of which may be unfinished."""

    prompt: Prompt
    name: tuple[int, int]  # (the group's first iteration, index in that iteration); the seeds depend on this name
    drafts: tuple[Draft, ...]

    @property
    def complete(self) -> bool:
        """True if all responses are finished."""
        return all(draft.finish for draft in self.drafts)

    def record(self) -> dict[str, Any]:
        """Returns the group as JSON values."""
        return {"id": self.prompt.id, "name": self.name, "drafts": [asdict(draft) for draft in self.drafts]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Self:
        """Restores a group from the value that `DraftGroup.record` returned. Raises ValueError if there is no longer a
        row with the group's prompt id.

        Args:
            prompts: row id -> row.
        """
        if record["id"] not in prompts:
            raise ValueError(
                f"responses to row {record['id']!r} are unfinished, but data.train does not have this row any more; "
                "the run can only continue with the rows that it was started with"
            )
        iteration, place = record["name"]
        return cls(prompts[record["id"]], (iteration, place), tuple(_draft(one) for one in record["drafts"]))


class PartialRollouts:
    """A sampler that ends an iteration when enough groups are complete. It keeps the other groups for the next
    iteration.

    Args:
        wanted: the number of complete groups that end an iteration.
        chunk: the maximum number of tokens by which every unfinished response grows in one step.
    """

    def __init__(self, pool: EnginePool, *, wanted: int, chunk: int) -> None:
        self.pool, self.wanted, self.chunk = pool, wanted, chunk
        self.check, self.greedy, self.load, self.encodings = pool.check, pool.greedy, pool.load, pool.encodings
        self._unfinished: dict[int, list[DraftGroup]] = {}  # iteration -> groups, for the newest two iterations

    @property
    def policy_step(self) -> int:
        """The number of policy updates that led to the engines' current weights."""
        return self.pool.policy_step

    def unfinished(self, iteration: int) -> list[dict[str, Any]]:
        """Returns the groups that were unfinished at the end of an iteration, as JSON values."""
        return [group.record() for group in self._unfinished.get(iteration, ())]

    def resume(self, iteration: int, unfinished: Iterable[Mapping[str, Any]], prompts: Sequence[Prompt]) -> None:
        """Restores the unfinished groups of an earlier run, so that sampling can continue after `iteration`.

        Args:
            unfinished: the groups that the method `unfinished` returned for this iteration.
        """
        by_id = {prompt.id: prompt for prompt in prompts}
        self._unfinished = {iteration: [DraftGroup.from_record(record, by_id) for record in unfinished]}

    def sample(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> Iterator[tuple[int, Rollout]]:
        """Starts responses to `prompts`, and continues the groups that the previous iteration left unfinished. Stops
        when the number of complete groups reaches `wanted`.

        Yields (index, rollout) for each response of a complete group. If too many groups become complete at the same
        time, the groups that started first are yielded. The others are kept for the next iteration.
        """
        groups = list(self._unfinished.get(iteration - 1, ()))
        groups += [DraftGroup(prompt, (iteration, n), (Draft(),) * per_prompt) for n, prompt in enumerate(prompts)]
        if len(groups) < self.wanted:
            raise ValueError(f"only {len(groups)} groups are in progress, but {self.wanted} groups are wanted")
        count = 0
        while True:
            taken = [group for group in groups if group.complete][: self.wanted - count // per_prompt]
            for rollout in (_rollout(group.prompt, draft, self.pool) for group in taken for draft in group.drafts):
                yield count, rollout
                count += 1
            names = {group.name for group in taken}
            groups = [group for group in groups if group.name not in names]
            if count == self.wanted * per_prompt:
                break
            groups = self._extended(groups)
        self._unfinished = {iteration - 1: self._unfinished.get(iteration - 1, []), iteration: groups}

    def _extended(self, groups: Sequence[DraftGroup]) -> list[DraftGroup]:
        """Samples one more chunk of every unfinished response, and returns the groups with these chunks."""
        unfinished = [[n for n, draft in enumerate(group.drafts) if not draft.finish] for group in groups]
        requests = [self._requests(group, indices) for group, indices in zip(groups, unfinished, strict=True)]
        completions = iter(in_order(self.pool.complete(requests)))
        extended = []
        for group, indices in zip(groups, unfinished, strict=True):
            drafts, room = list(group.drafts), self.pool.room(group.prompt)
            for index in indices:
                drafts[index] = drafts[index].extended(next(completions), self.policy_step, room)
            extended.append(replace(group, drafts=tuple(drafts)))
        return extended

    def _requests(self, group: DraftGroup, indices: Sequence[int]) -> list[Request]:
        """Returns requests that continue the drafts at `indices`."""
        sampled = [group.drafts[index].response_ids for index in indices]
        names = [(*group.name, n, *([len(ids)] if ids else [])) for n, ids in zip(indices, sampled, strict=True)]
        return [
            replace(r, prompt_ids=r.prompt_ids + ids, max_tokens=min(self.chunk, r.max_tokens - len(ids)))
            for r, ids in zip(self.pool.requests(group.prompt, names), sampled, strict=True)
        ]


def _rollout(prompt: Prompt, draft: Draft, pool: EnginePool) -> Rollout:
    assert draft.finish is not None
    completion = Completion(draft.prompt_ids, draft.response_ids, draft.logprobs, draft.finish, draft.unusable)
    return replace(pool.rollout(prompt, completion), policy_step=draft.pieces[0][0], pieces=draft.pieces)


def _with_piece(pieces: tuple[tuple[int, int], ...], new: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Appends a piece. If the same weights sampled the last piece and the new piece, these two pieces are joined."""
    if pieces and pieces[-1][0] == new[0]:
        return (*pieces[:-1], (new[0], pieces[-1][1] + new[1]))
    return (*pieces, new)


def _draft(record: Mapping[str, Any]) -> Draft:
    steps = tuple((step, tokens) for step, tokens in record["pieces"])
    lists = {name: tuple(record[name]) for name in ("response_ids", "logprobs", "prompt_ids")}
    return Draft(**lists, pieces=steps, finish=record["finish"], unusable=record.get("unusable", ""))
