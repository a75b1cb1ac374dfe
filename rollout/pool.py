"""Prompts to rollouts over any number of engines; hides how many there are.

Work is dealt by a fixed rule (prompt i to engine i mod n) and every request carries its own seed, so that the same
recipe gives the same samples again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rl.stop import SourceDied, WorkerDied
from rl.types import Completion, Prompt, Request, Rollout
from rollout.chat import Chat


class Pending(Protocol):
    def result(self, patience: float | None = None) -> Any: ...


class Worker(Protocol):
    """A rollout.vllm.engine.Engine somewhere."""

    def start(self, method: str, *args: Any) -> Pending: ...
    def stream(self, method: str, *args: Any) -> Any: ...


Finished = Callable[[int, Rollout], None]
"""Told of each rollout, and its place in the result, when it is there."""


def seed_of(*parts: object) -> int:
    """A sampling seed, 0 <= seed < 2^31, from what identifies a sample; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


class EnginePool:
    """All rollout workers behind `sample`, `greedy` and `load`.

    Args:
        workers: engines, each anywhere.
        as_they_come: what several of their streams yield, in order of arrival, with each stream's index; a WorkerDied
            for one that died, or was silent for as many seconds as its second argument says.
        max_sequence_length: tokens of prompt and response together.
        temperature: of `sample`.
        check_tokens: the most that a response of `check` has.
        patience: seconds without a sign of life after which a worker counts as dead.
        replacement: told of a worker's number and what happened to it, gives another; raises if there is none.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        as_they_come: Callable[[Sequence[Any], float], Iterable[tuple[int, Any]]],
        chat: Chat,
        *,
        max_sequence_length: int,
        temperature: float,
        seed: int,
        check_tokens: int = 64,
        patience: float = 600.0,
        replacement: Callable[[int, WorkerDied], Worker] | None = None,
    ) -> None:
        self.workers, self.as_they_come, self.chat = list(workers), as_they_come, chat
        self.max_sequence_length, self.temperature, self.seed = max_sequence_length, temperature, seed
        self.check_tokens, self.patience, self.replacement = check_tokens, patience, replacement
        self.policy_step = 0
        self.replaced = 0  # workers so far
        self._weights: Any = None  # those that all engines have, for one that takes another's place
        self._encoded: dict[int, int] = {}  # by worker, when it was asked last
        self._encoded_by_dead = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        per_prompt: int,
        iteration: int,
        finished: Finished = lambda place, rollout: None,
        *,
        purpose: str = "",
        longest: int | None = None,
    ) -> list[Rollout]:
        """`per_prompt` rollouts of each prompt, neighbours in the result.

        Args:
            purpose: a name for samples that are not the iteration's own, which keeps their seeds apart.
            longest: tokens of prompt and response together, if they may be fewer than usual.
        """
        named = (purpose,) if purpose else ()
        return self._rollouts(
            [
                [self.request(prompt, (*named, iteration, place, index), longest) for index in range(per_prompt)]
                for place, prompt in enumerate(prompts)
            ],
            prompts,
            finished,
        )

    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
        """One short rollout of each prompt, to compare the logprobs after a weight sync."""
        requests = [self.request(prompt, (-iteration - 1, place, 0)) for place, prompt in enumerate(prompts)]
        short = [[replace(r, max_tokens=min(r.max_tokens, self.check_tokens))] for r in requests]
        return self._rollouts(short, prompts, lambda place, rollout: None)

    def greedy(self, prompts: Sequence[Prompt], finished: Finished = lambda place, rollout: None) -> list[Rollout]:
        """The single most likely response of each prompt."""
        requests = [[replace(self.request(prompt, ()), seed=0, temperature=0.0)] for prompt in prompts]
        return self._rollouts(requests, prompts, finished)

    def load(self, weights: Any, policy_step: int) -> None:
        """Give all engines new weights, a mapping from tensor names on disk or a pending one."""
        self._weights, self.policy_step = weights, policy_step
        for number, pending in enumerate([worker.start("load", weights, policy_step) for worker in self.workers]):
            try:
                pending.result(self.patience)
            except SourceDied:  # no engine is to blame, and no other could do it
                raise
            except WorkerDied as died:
                self._replace(number, died)

    def encodings(self) -> int:
        """Pictures that the engines' vision towers have encoded so far, as far as they lived to tell."""
        for number, pending in enumerate([worker.start("encodings") for worker in self.workers]):
            try:
                self._encoded[number] = pending.result(self.patience)
            except WorkerDied as died:
                self._replace(number, died)
        return sum(self._encoded.values()) + self._encoded_by_dead

    def _replace(self, number: int, died: WorkerDied) -> None:
        """Another worker with the same weights in its place."""
        if self.replacement is None:
            raise died
        self.workers[number] = worker = self.replacement(number, died)
        self._encoded_by_dead += self._encoded.pop(number, 0)
        if self._weights is not None:
            worker.start("load", self._weights, self.policy_step).result(self.patience)
        self.replaced += 1

    def room(self, prompt: Prompt, longest: int | None = None) -> int:
        """Tokens that a response may have. Raises ValueError if there is no room for any."""
        longest = longest or self.max_sequence_length
        room = longest - self.chat.length(prompt)
        if room < 1:
            raise ValueError(
                f"row {prompt.id} has {self.chat.length(prompt)} tokens with its pictures and messages, which leaves "
                f"no room for a response in a sequence of {longest}"
            )
        return room

    def request(self, prompt: Prompt, name: Sequence[int | str], longest: int | None = None) -> Request:
        """For a sample whose seed comes from `name`, what identifies it in the run."""
        seed = seed_of(self.seed, *name)
        return Request(self.chat.prompt_ids(prompt), prompt.images, self.room(prompt, longest), seed, self.temperature)

    def complete(
        self,
        requests: Sequence[Sequence[Request]],
        finished: Callable[[int, Completion], None] = lambda place, completion: None,
    ) -> list[Completion]:
        """Answers to all requests, in order; see `consume`."""
        found: dict[int, Completion] = {}

        def here(place: int, completion: Completion) -> None:
            found[place] = completion
            finished(place, completion)

        self.consume(requests, here)
        return [found[place] for place in sorted(found)]

    def consume(self, requests: Sequence[Sequence[Request]], finished: Callable[[int, Completion], None]) -> None:
        """Have all requests answered; those of one inner list go to the same engine, which shares their prompt.

        Args:
            finished: told of each answer, and its place among the requests, when it is there; nothing is kept. What a
                worker had not answered when it died is asked of its replacement.
        """
        owners = [row for row, group in enumerate(requests) for _ in group]
        flat = [request for group in requests for request in group]
        found: set[int] = set()

        def here(place: int, completion: Completion) -> None:
            found.add(place)
            finished(place, completion)

        while left := [place for place in range(len(flat)) if place not in found]:
            shares: list[list[int]] = [[] for _ in self.workers]  # of places in the result
            for place in left:
                shares[owners[place] % len(self.workers)].append(place)
            if not self._ask(flat, shares, here) and len(found) < len(flat):
                raise RuntimeError(f"the engines returned {len(found)} of {len(flat)} responses")

    def _ask(
        self, requests: Sequence[Request], shares: Sequence[Sequence[int]], here: Callable[[int, Completion], None]
    ) -> bool:
        """Let every worker answer its share. Returns whether one had to be replaced."""
        busy = [(number, share) for number, share in enumerate(shares) if share]
        streams = [self.workers[n].stream("stream", [requests[place] for place in share]) for n, share in busy]
        replaced = False
        for which, answers in self.as_they_come(streams, self.patience):
            number, share = busy[which]
            if isinstance(answers, WorkerDied):
                self._replace(number, answers)
                replaced = True
                continue
            for index, completion in answers:
                here(share[index], completion)
        return replaced

    def rollout(self, prompt: Prompt, completion: Completion) -> Rollout:
        """A response by the present weights."""
        return Rollout(
            prompt=prompt,
            text=self.chat.text(completion.prompt_ids, completion.response_ids),
            finish=completion.finish,
            prompt_ids=completion.prompt_ids,
            response_ids=completion.response_ids,
            rollout_logprobs=completion.logprobs,
            policy_step=self.policy_step,
        )

    def _rollouts(
        self, requests: Sequence[Sequence[Request]], prompts: Sequence[Prompt], finished: Finished
    ) -> list[Rollout]:
        asked = [prompt for prompt, group in zip(prompts, requests, strict=True) for _ in group]
        found: dict[int, Rollout] = {}

        def here(place: int, completion: Completion) -> None:
            found[place] = self.rollout(asked[place], completion)
            finished(place, found[place])

        self.complete(requests, here)
        return [found[place] for place in range(len(asked))]


def lengths(chat: Chat, prompts: Sequence[Prompt]) -> Mapping[str, int]:
    """Row id -> tokens of its prompt with its pictures."""
    return {p.id: chat.length(p) for p in prompts}
