"""Scripted engines and a scripted chat, for tests of the engine pool."""

from collections.abc import Iterator, Sequence
from typing import Any

from rl.remote import Ready
from rl.types import Completion, Prompt, Request
from rollout.pool import EnginePool


class Echo:
    """An engine whose response has two tokens: the first token of the prompt, and the seed of the request."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.loaded: list[tuple[Any, int]] = []

    def stream(self, requests: Sequence[Request]) -> list[list[tuple[int, Completion]]]:
        """Returns the completions two at a time, beginning with the last request."""
        self.asked += requests
        made = [Completion(r.prompt_ids, (r.prompt_ids[0], r.seed), (-0.5, -0.5), "stop") for r in requests]
        pairs = list(enumerate(made))[::-1]
        return [pairs[i : i + 2] for i in range(0, len(pairs), 2)]

    def load(self, weights: Any, step: int) -> Ready[None]:
        return Ready(self.loaded.append((weights, step)))

    def encodings(self) -> Ready[int]:
        return Ready(0)


class Letters:
    """A chat that converts each prompt into one token: the id of the row."""

    never_sampled = frozenset[int]()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return (int(prompt.id),)

    def length(self, prompt: Prompt) -> int:
        return 1

    def text(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return f"answer to {response_ids[0]}"


def in_turns(streams: Sequence[list], patience: float = 0) -> Iterator[tuple[int, Any]]:
    """Yields the first step of every stream, then the second step of every stream, and so on, until all streams have
    ended."""
    for step in range(max(map(len, streams))):
        yield from ((number, stream[step]) for number, stream in enumerate(streams) if step < len(stream))


def pool(workers: int, length: int = 10) -> tuple[EnginePool, list[Echo]]:
    engines = [Echo() for _ in range(workers)]
    chat: Any = Letters()
    return EnginePool(engines, in_turns, chat, max_sequence_length=length, temperature=0.7, seed=3), engines


PROMPTS = [Prompt(str(i), "t", ()) for i in range(5)]
