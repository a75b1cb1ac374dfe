"""Runs all vLLM engines of the tests in one separate process, because vLLM changes torch and the environment."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from rl.types import Completion, Picture, Request
from rollout.vllm.engine import Engine
from tests.support.patience import Deadline

PATIENCE_S = 300.0  # maximum seconds for one call

_engines: dict[int, Engine] = {}  # key -> engine; has entries only in the separate process


class RemoteEngine:
    """An object with the methods of an Engine. Each method calls the Engine in the separate process."""

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
    """A process that imports vLLM once and runs several engines. Its exceptions are raised again in the test."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=os.setsid)
        self._pid = self._pool.submit(os.getpid).result()
        self._count = 0

    def start(self, folder: Path, **options: Any) -> RemoteEngine:
        self._count += 1
        self.run(_start, self._count, str(folder), {"dtype": "float32", "max_sequence_length": 512} | options)
        return RemoteEngine(self, self._count)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls an importable function in the separate process. The process is killed if the call does not return
        within PATIENCE_S seconds, or within the time limit of the test."""
        call, deadline = self._pool.submit(function, *arguments), Deadline(PATIENCE_S)
        try:
            while not call.done() and not deadline.passed():
                wait([call], timeout=min(PATIENCE_S, 1.0))
            return call.result(timeout=0)
        finally:
            if not call.done():
                self._kill()

    def close(self) -> None:
        """Ends the separate process, and the processes that vLLM has started there."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)


def _start(key: int, folder: str, options: Mapping[str, Any]) -> None:
    _engines[key] = Engine(folder, **options)


def _call(key: int, method: str, *arguments: Any) -> Any:
    return getattr(_engines[key], method)(*arguments)


def _get(key: int, attribute: str) -> Any:
    return getattr(_engines[key], attribute)


def shared_memory_segments() -> set[str]:
    """Returns the names of all shared memory segments on this machine that Python has made."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}
