"""Uses all vLLM engines as one sampler, which returns rollouts for prompts.

With n engines, prompt i always goes to engine i mod n, and every request has its own seed. So a repeated run of the
same recipe gives the same samples.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from rl.remote import Future, Stream
from rl.stop import SourceDied, WorkerDied
from rl.types import Completion, Prompt, Request, Rollout
from rollout.chat import Chat

Result = TypeVar("Result")


class EngineHandle(Protocol):
    """The interface of an engine's client, such as rollout.vllm.client.EngineClient."""

    def stream(self, requests: Sequence[Request]) -> Stream: ...
    def load(self, weights: Any, step: int) -> Future[None]: ...
    def encodings(self) -> Future[int]: ...


def seed_of(*parts: object) -> int:
    """Computes a sampling seed (0 <= seed < 2^31) from `parts`, the values that identify a sample.

    The same values give the same seed on every machine.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


class EnginePool:
    """Distributes the requests of `sample`, `greedy` and `check` over all engines. `load` updates every engine.

    `sample` and `greedy` yield (index, rollout) pairs as soon as the responses arrive. The index is the number of the
    response, counted in the order of the prompts. The caller must read all pairs.

    Args:
        engines: clients of the engines. The engines may run in other processes.
        merge_streams: a function that is called with the streams of several engines and `patience`. It yields (index of
            the stream, value) in the order of arrival. If an engine died or hung, the last value of its stream is a
            WorkerDied.
        max_sequence_length: maximum number of tokens of prompt and response together.
        temperature: the temperature of `sample`.
        check_tokens: maximum length, in tokens, of the responses that `check` samples.
        patience: an engine that sends nothing for this many seconds counts as dead.
        replacement: a function that is called with the number of a dead engine and the error of this engine. The
            function returns a new engine, or raises an error. None means that a dead engine is not replaced, and that
            the error of this engine is raised.
    """

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        merge_streams: Callable[[Sequence[Any], float], Iterable[tuple[int, Any]]],
        chat: Chat,
        *,
        max_sequence_length: int,
        temperature: float,
        seed: int,
        check_tokens: int = 64,
        patience: float = 600.0,
        replacement: Callable[[int, WorkerDied], EngineHandle] | None = None,
    ) -> None:
        self.engines, self.merge_streams, self.chat = list(engines), merge_streams, chat
        self.max_sequence_length, self.temperature, self.seed = max_sequence_length, temperature, seed
        self.check_tokens, self.patience, self.replacement = check_tokens, patience, replacement
        self.policy_step = 0
        self.replaced = 0  # number of engines replaced so far
        self._weights: Any = None  # weights of the last `load`; an engine that replaces a dead engine loads them too
        self._encoded: dict[int, int] = {}  # engine -> its number of encoded pictures at the last call of `encodings`
        self._encoded_by_dead = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        per_prompt: int,
        iteration: int,
        *,
        purpose: str = "",
        longest: int | None = None,
    ) -> Iterator[tuple[int, Rollout]]:
        """Samples `per_prompt` responses to each prompt. The responses to one prompt have consecutive indices.

        Args:
            purpose: a text on which the seeds depend. So samples for different purposes get different seeds.
            longest: maximum number of tokens of prompt and response together. None means `max_sequence_length`.
        """
        named = (purpose,) if purpose else ()
        requests = [
            self.requests(prompt, [(*named, iteration, place, index) for index in range(per_prompt)], longest)
            for place, prompt in enumerate(prompts)
        ]
        return self._rollouts(requests, prompts)

    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
        """Samples one short response to each prompt. After a weight sync, the engines' logprobs of these responses are
        compared with the learner's logprobs."""
        requests = [self.requests(prompt, [(-iteration - 1, place, 0)]) for place, prompt in enumerate(prompts)]
        short = [[replace(r, max_tokens=min(r.max_tokens, self.check_tokens)) for r in group] for group in requests]
        return in_order(self._rollouts(short, prompts))

    def greedy(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Rollout]]:
        """Generates one greedy response (temperature 0) to each prompt."""
        requests = [self.requests(prompt, [()]) for prompt in prompts]
        return self._rollouts([[replace(r, seed=0, temperature=0.0) for r in g] for g in requests], prompts)

    def load(self, weights: Any, policy_step: int) -> None:
        """Loads new weights into all engines.

        Args:
            weights: a mapping from the names of tensors in model files to tensors, or the Future of such a mapping.
        """
        self._weights, self.policy_step = weights, policy_step
        for number, pending in enumerate([engine.load(weights, policy_step) for engine in self.engines]):
            try:
                pending.result(self.patience)
            except SourceDied:  # the policy died, not the engine, so a new engine could not load the weights either
                raise
            except WorkerDied as died:
                self._replace(number, died)

    def encodings(self) -> int:
        """Returns the number of pictures that the engines have encoded so far. Pictures that an engine encoded, but did
        not report before it died, are not counted."""
        for number, pending in enumerate([engine.encodings() for engine in self.engines]):
            try:
                self._encoded[number] = pending.result(self.patience)
            except WorkerDied as died:
                self._replace(number, died)
        return sum(self._encoded.values()) + self._encoded_by_dead

    def _replace(self, number: int, died: WorkerDied) -> None:
        """Replaces a dead engine with a new engine, which loads the current weights."""
        if self.replacement is None:
            raise died
        self.engines[number] = engine = self.replacement(number, died)
        self._encoded_by_dead += self._encoded.pop(number, 0)
        if self._weights is not None:
            engine.load(self._weights, self.policy_step).result(self.patience)
        self.replaced += 1

    def room(self, prompt: Prompt, longest: int | None = None) -> int:
        """Returns the maximum number of tokens of a response to the prompt. Raises ValueError if there is no room for a
        response."""
        longest, length = longest or self.max_sequence_length, self.chat.length(prompt)
        if length >= longest:
            raise ValueError(
                f"row {prompt.id} has {length} tokens with its pictures and messages, so there is "
                f"no room for a response in a sequence of {longest} tokens"
            )
        return longest - length

    def requests(
        self, prompt: Prompt, names: Sequence[Sequence[int | str]], longest: int | None = None
    ) -> list[Request]:
        """Returns one request for each name. A name identifies a sample in the run, and the sample's seed is derived
        from the name."""
        ids, room = self.chat.prompt_ids(prompt), self.room(prompt, longest)
        return [Request(ids, prompt.images, room, seed_of(self.seed, *name), self.temperature) for name in names]

    def complete(self, requests: Sequence[Sequence[Request]]) -> Iterator[tuple[int, Completion]]:
        """Yields (index of the request, completion) in the order of arrival.

        The requests of one inner list are sent to the same engine, which computes their common prompt only once. If
        an engine dies, the requests that it has not answered are sent to the engine that replaces it.
        """
        owners = [row for row, group in enumerate(requests) for _ in group]
        flat = [request for group in requests for request in group]
        missing = set(range(len(flat)))
        while missing:
            shares: list[list[int]] = [[] for _ in self.engines]  # for each engine: indices of its requests
            for index in sorted(missing):
                shares[owners[index] % len(self.engines)].append(index)
            busy = [(number, share) for number, share in enumerate(shares) if share]
            streams = [self.engines[number].stream([flat[index] for index in share]) for number, share in busy]
            replaced = False
            for which, completions in self.merge_streams(streams, self.patience):
                number, share = busy[which]
                if isinstance(completions, WorkerDied):
                    self._replace(number, completions)
                    replaced = True
                    continue
                for position, completion in completions:
                    missing.discard(share[position])
                    yield share[position], completion
            if missing and not replaced:
                raise RuntimeError(f"the engines returned only {len(flat) - len(missing)} of {len(flat)} responses")

    def rollout(self, prompt: Prompt, completion: Completion) -> Rollout:
        """Converts a completion into a Rollout. The completion must have been sampled with the current weights."""
        return Rollout(
            prompt=prompt,
            text="" if completion.unusable else self.chat.text(completion.prompt_ids, completion.response_ids),
            finish=completion.finish,
            prompt_ids=completion.prompt_ids,
            response_ids=completion.response_ids,
            rollout_logprobs=completion.logprobs,
            policy_step=self.policy_step,
            unusable=completion.unusable or self._forbidden(completion),
        )

    def _forbidden(self, completion: Completion) -> str:
        """Returns why a response cannot be used if it has a token that this project's engines never sample, or ""."""
        found = set(completion.response_ids) & self.chat.never_sampled
        return f"the engine sampled the tokens {sorted(found)}, which stand for pictures or videos" if found else ""

    def _rollouts(
        self, requests: Sequence[Sequence[Request]], prompts: Sequence[Prompt]
    ) -> Iterator[tuple[int, Rollout]]:
        owners = [prompt for prompt, group in zip(prompts, requests, strict=True) for _ in group]
        for index, completion in self.complete(requests):
            yield index, self.rollout(owners[index], completion)


def in_order(pairs: Iterable[tuple[int, Result]]) -> list[Result]:
    """Returns the values of (index, value) pairs, sorted by index."""
    found = dict(pairs)
    return [found[index] for index in sorted(found)]
