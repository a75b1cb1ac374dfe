"""Prompts to rollouts over any number of engines; hides how many there are.

Work is dealt by a fixed rule (prompt i to engine i mod n) and every request carries its own seed, so that the same
recipe gives the same samples again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rl.types import Completion, Prompt, Request, Rollout
from rollout.chat import Chat


class Pending(Protocol):
    def result(self) -> Any: ...


class Worker(Protocol):
    """A rollout.engine.Engine somewhere."""

    def start(self, method: str, *args: Any) -> Pending: ...
    def stream(self, method: str, *args: Any) -> Any: ...


Finished = Callable[[int, Rollout], None]
"""Told of each rollout, and its place in the result, when it is there."""


def seed_of(*parts: object) -> int:
    """A sampling seed, 0 <= seed < 2^31, from what identifies a sample; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


class Pool:
    """All rollout workers behind `sample`, `greedy` and `load`.

    Args:
        workers: engines, each anywhere.
        as_they_come: what several of their streams yield, in order of arrival, with each stream's index.
        max_sequence_length: tokens of prompt and response together.
        temperature: of `sample`.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        as_they_come: Callable[[Sequence[Any]], Iterable[tuple[int, Any]]],
        chat: Chat,
        *,
        max_sequence_length: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.workers, self.as_they_come, self.chat = list(workers), as_they_come, chat
        self.max_sequence_length, self.temperature, self.seed = max_sequence_length, temperature, seed
        self.policy_step = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        per_prompt: int,
        iteration: int,
        finished: Finished = lambda place, rollout: None,
    ) -> list[Rollout]:
        """`per_prompt` rollouts of each prompt, neighbours in the result."""
        return self._rollouts(
            [
                [self.request(prompt, (iteration, place, index)) for index in range(per_prompt)]
                for place, prompt in enumerate(prompts)
            ],
            prompts,
            finished,
        )

    def greedy(self, prompts: Sequence[Prompt], finished: Finished = lambda place, rollout: None) -> list[Rollout]:
        """The single most likely response of each prompt."""
        requests = [[replace(self.request(prompt, ()), seed=0, temperature=0.0)] for prompt in prompts]
        return self._rollouts(requests, prompts, finished)

    def load(self, weights: Any, policy_step: int) -> None:
        """Give all engines new weights, a mapping from tensor names on disk or a pending one."""
        for pending in [worker.start("load", weights, policy_step) for worker in self.workers]:
            pending.result()
        self.policy_step = policy_step

    def encodings(self) -> int:
        """Pictures that the engines' vision towers have encoded so far."""
        return sum(pending.result() for pending in [worker.start("encodings") for worker in self.workers])

    def room(self, prompt: Prompt) -> int:
        """Tokens that a response may have. Raises ValueError if there is no room for any."""
        room = self.max_sequence_length - self.chat.length(prompt)
        if room < 1:
            raise ValueError(
                f"row {prompt.id} has {self.chat.length(prompt)} tokens with its pictures, which leaves no room for a "
                f"response in max_sequence_length {self.max_sequence_length}"
            )
        return room

    def request(self, prompt: Prompt, name: Sequence[int]) -> Request:
        """For a sample whose seed comes from `name`, the numbers that identify it in the run."""
        seed = seed_of(self.seed, *name)
        return Request(self.chat.prompt_ids(prompt), prompt.images, self.room(prompt), seed, self.temperature)

    def complete(
        self,
        requests: Sequence[Sequence[Request]],
        finished: Callable[[int, Completion], None] = lambda place, completion: None,
    ) -> list[Completion]:
        """Answers to all requests, in order; those of one inner list go to the same engine, which shares their prompt.

        Args:
            finished: told of each answer, and its place in the result, when it is there.
        """
        owners = [row for row, group in enumerate(requests) for _ in group]
        flat = [request for group in requests for request in group]
        shares: list[list[int]] = [[] for _ in self.workers]  # of places in the result
        for place, row in enumerate(owners):
            shares[row % len(self.workers)].append(place)
        busy = [(worker, share) for worker, share in zip(self.workers, shares, strict=True) if share]
        streams = [worker.stream("stream", [flat[place] for place in share]) for worker, share in busy]
        found: dict[int, Completion] = {}
        for number, completions in self.as_they_come(streams):
            for index, completion in completions:
                place = busy[number][1][index]
                found[place] = completion
                finished(place, completion)
        if len(found) < len(flat):
            raise RuntimeError(f"the engines returned {len(found)} of {len(flat)} responses")
        return [found[place] for place in range(len(flat))]

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
