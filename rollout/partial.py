"""Partial rollouts: an iteration ends when enough of its groups are whole, and what is cut goes on in the next one.

More prompts are under way than an iteration needs. All their responses grow by the same number of tokens at a time;
once enough groups are whole, those are the iteration's samples, and the others wait, begun. The longest responses then
hold up nobody, and their tokens keep the logprobs of whichever weights sampled them. Counting tokens instead of seconds
makes the same recipe and seed choose the same groups again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from rl.types import Completion, Finish, Prompt, Request, Rollout
from rollout.pool import EnginePool, Finished


@dataclass(frozen=True)
class Draft:
    """All that has been sampled of one response."""

    response_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()  # (policy_step, tokens) of each part, in order
    prompt_ids: tuple[int, ...] = ()  # image slots expanded; known from the first part on
    finish: Finish | None = None  # None: it goes on

    def grown(self, more: Completion, policy_step: int, room: int) -> Self:
        """With what has been sampled on top, of at most `room` tokens in all."""
        ids = self.response_ids + more.response_ids
        ended = more.finish == "stop" or len(ids) >= room
        return replace(
            self,
            response_ids=ids,
            logprobs=self.logprobs + more.logprobs,
            pieces=_merged(self.pieces, (policy_step, len(more.response_ids))),
            prompt_ids=self.prompt_ids or more.prompt_ids,
            finish=more.finish if ended else None,
        )


@dataclass(frozen=True)
class Begun:
    """A prompt and its responses, of which some may be under way."""

    prompt: Prompt
    name: tuple[int, int]  # iteration and place that it was begun at; its seeds come from it
    drafts: tuple[Draft, ...]

    @property
    def whole(self) -> bool:
        return all(draft.finish for draft in self.drafts)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"id": self.prompt.id, "name": self.name, "drafts": [asdict(draft) for draft in self.drafts]}

    @classmethod
    def of(cls, record: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Self:
        """What `record` gave, with the row that has its id. Raises ValueError if there is none any more."""
        if record["id"] not in prompts:
            raise ValueError(
                f"responses to row {record['id']!r} were begun, but data.train does not have it any more; the run can "
                "only go on with the rows that it was started with"
            )
        iteration, place = record["name"]
        return cls(prompts[record["id"]], (iteration, place), tuple(_draft(one) for one in record["drafts"]))


class PartialRollouts:
    """A pool whose iterations end with `wanted` whole groups, and which knows what each iteration has left begun.

    Args:
        chunk: tokens by which responses grow at a time.
    """

    def __init__(self, pool: EnginePool, *, wanted: int, chunk: int) -> None:
        self.pool, self.wanted, self.chunk = pool, wanted, chunk
        self._left: dict[int, list[Begun]] = {}  # by iteration, of the newest two

    @property
    def policy_step(self) -> int:
        """As rollout.pool.EnginePool's."""
        return self.pool.policy_step

    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
        """As rollout.pool.EnginePool's."""
        return self.pool.check(prompts, iteration)

    def greedy(self, prompts: Sequence[Prompt], finished: Finished = lambda place, rollout: None) -> list[Rollout]:
        """As rollout.pool.EnginePool's."""
        return self.pool.greedy(prompts, finished)

    def load(self, weights: Any, policy_step: int) -> None:
        """As rollout.pool.EnginePool's."""
        self.pool.load(weights, policy_step)

    def encodings(self) -> int:
        """As rollout.pool.EnginePool's."""
        return self.pool.encodings()

    def left(self, iteration: int) -> list[dict[str, Any]]:
        """What an iteration has left begun, as JSON can hold it."""
        return [group.record() for group in self._left.get(iteration, ())]

    def resume(self, iteration: int, left: Iterable[Mapping[str, Any]], prompts: Sequence[Prompt]) -> None:
        """Go on after `iteration`, which left what `left` gave then."""
        by_id = {prompt.id: prompt for prompt in prompts}
        self._left = {iteration: [Begun.of(record, by_id) for record in left]}

    def sample(
        self,
        prompts: Sequence[Prompt],
        per_prompt: int,
        iteration: int,
        finished: Finished = lambda place, rollout: None,
    ) -> list[Rollout]:
        """Begin `prompts`, and go on with what the iteration before has left, until `wanted` groups are whole.

        Of groups that become whole at the same moment, those that were begun first are taken.
        """
        begun = list(self._left.get(iteration - 1, ()))
        begun += [Begun(prompt, (iteration, place), (Draft(),) * per_prompt) for place, prompt in enumerate(prompts)]
        if len(begun) < self.wanted:
            raise ValueError(f"{len(begun)} groups are under way, fewer than the {self.wanted} that are wanted")
        rollouts: list[Rollout] = []
        while True:
            whole = [group for group in begun if group.whole][: self.wanted - len(rollouts) // per_prompt]
            for rollout in (_rollout(group.prompt, draft, self.pool) for group in whole for draft in group.drafts):
                finished(len(rollouts), rollout)
                rollouts.append(rollout)
            taken = {group.name for group in whole}
            begun = [group for group in begun if group.name not in taken]
            if len(rollouts) == self.wanted * per_prompt:
                break
            begun = self._grown(begun)
        self._left = {iteration - 1: self._left.get(iteration - 1, []), iteration: begun}
        return rollouts

    def _grown(self, groups: Sequence[Begun]) -> list[Begun]:
        """All responses that are under way, by one chunk."""
        ways = [[index for index, draft in enumerate(group.drafts) if not draft.finish] for group in groups]
        asked = [
            [self._request(group, index) for index in indices] for group, indices in zip(groups, ways, strict=True)
        ]
        answers = iter(self.pool.complete(asked))
        grown = []
        for group, indices in zip(groups, ways, strict=True):
            drafts = list(group.drafts)
            room = self.pool.room(group.prompt)
            for index in indices:
                drafts[index] = drafts[index].grown(next(answers), self.policy_step, room)
            grown.append(replace(group, drafts=tuple(drafts)))
        return grown

    def _request(self, group: Begun, index: int) -> Request:
        done = group.drafts[index].response_ids
        request = self.pool.request(group.prompt, (*group.name, index, *([len(done)] if done else [])))
        most = min(self.chunk, request.max_tokens - len(done))
        return replace(request, prompt_ids=request.prompt_ids + done, max_tokens=most)


def _rollout(prompt: Prompt, draft: Draft, pool: EnginePool) -> Rollout:
    assert draft.finish is not None
    completion = Completion(draft.prompt_ids, draft.response_ids, draft.logprobs, draft.finish)
    return replace(pool.rollout(prompt, completion), policy_step=draft.pieces[0][0], pieces=draft.pieces)


def _merged(pieces: tuple[tuple[int, int], ...], new: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """With one more piece, which joins the last if the same weights made both."""
    if pieces and pieces[-1][0] == new[0]:
        return (*pieces[:-1], (new[0], pieces[-1][1] + new[1]))
    return (*pieces, new)


def _draft(record: Mapping[str, Any]) -> Draft:
    steps = tuple((step, tokens) for step, tokens in record["pieces"])
    lists = {name: tuple(record[name]) for name in ("response_ids", "logprobs", "prompt_ids")}
    return Draft(**lists, pieces=steps, finish=record["finish"])
