"""Typed client of a vLLM engine, which runs in a process of its own. A method that returns a Future does not wait.

Tested in tests/rl/test_remote.py.
"""

from collections.abc import Sequence
from typing import Any

from rl.remote import Future, Stream, StreamingRemote
from rl.types import Request
from rollout.vllm.engine import Engine


class EngineClient:
    """rollout.vllm.engine.Engine in its process."""

    def __init__(self, remote: StreamingRemote[Engine]) -> None:
        self.remote = remote

    def stream(self, requests: Sequence[Request]) -> Stream:
        """Begins to answer the requests. The stream yields lists of (index of the request, Completion)."""
        return self.remote.stream(Engine.stream, requests)

    def load(self, weights: Any, step: int) -> Future[None]:
        """Loads new weights: tensors by their names on disk, or the Future of them."""
        return self.remote.start(Engine.load, weights, step)

    def encodings(self) -> Future[int]:
        """The number of pictures that the vision tower has encoded so far."""
        return self.remote.start(Engine.encodings)
