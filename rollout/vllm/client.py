"""Typed client for a vLLM engine, which runs in another process.

A method that returns a Future does not wait for the result. Tested in tests/rl/test_remote.py.
"""

from collections.abc import Sequence
from typing import Any

from rl.remote import Future, Stream, StreamingRemote
from rl.types import Request
from rollout.vllm.engine import Engine


class EngineClient:
    """Calls rollout.vllm.engine.Engine in the engine's process."""

    def __init__(self, remote: StreamingRemote[Engine]) -> None:
        self.remote = remote

    def stream(self, requests: Sequence[Request]) -> Stream:
        """Starts to answer the requests. The returned stream yields lists of (index of the request, Completion)."""
        return self.remote.stream(Engine.stream, requests)

    def load(self, weights: Any, step: int) -> Future[None]:
        """Loads new weights. `weights` is a mapping from the names of tensors in model files to tensors, or the Future
        of such a mapping."""
        return self.remote.start(Engine.load, weights, step)

    def encodings(self) -> Future[int]:
        """Returns the number of pictures that the vision tower has encoded so far."""
        return self.remote.start(Engine.encodings)
