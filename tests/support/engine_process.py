"""vLLM engines for tests in one process of their own: they alter torch and the environment of their process."""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rl.types import Completion, Picture, Request
from rollout.vllm.engine import Engine

_engines: dict[int, Engine] = {}  # in the engines' process


class RemoteEngine:
    """An Engine of the other process, with the same methods."""

    def __init__(self, process: "EngineProcess", key: int) -> None:
        self._process, self._key = process, key

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self._process.run(_call, self._key, "generate", requests)

    def score(self, token_ids: Sequence[int], images: Sequence[Picture] = ()) -> list[float]:
        return self._process.run(_call, self._key, "score", token_ids, images)

    def load(self, weights: Mapping[str, Any], step: int) -> None:
        self._process.run(_call, self._key, "load", weights, step)

    def close(self) -> None:
        self._process.run(_call, self._key, "close")

    def get(self, attribute: str) -> Any:
        return self._process.run(_get, self._key, attribute)


class EngineProcess:
    """Imports vLLM once; engines in it share the cost. Errors are raised here as they were there."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._count = 0

    def start(self, folder: Path, **options: Any) -> RemoteEngine:
        self._count += 1
        self.run(_start, self._count, str(folder), {"dtype": "float32", "max_sequence_length": 512} | options)
        return RemoteEngine(self, self._count)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call an importable function over there."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def _start(key: int, folder: str, options: Mapping[str, Any]) -> None:
    _engines[key] = Engine(folder, **options)


def _call(key: int, method: str, *arguments: Any) -> Any:
    return getattr(_engines[key], method)(*arguments)


def _get(key: int, attribute: str) -> Any:
    return getattr(_engines[key], attribute)


def shared_memory_segments() -> set[str]:
    """Named segments on this machine."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}
