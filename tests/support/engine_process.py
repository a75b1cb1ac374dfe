"""Runs each vLLM engine of the tests in a process of its own, because vLLM changes torch and the environment, and
because the engines of one process share global variables: if one engine is closed, another can fail.

vLLM is imported only once, by the fork server of the module multiprocessing. All processes are forked from this server.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rl.types import Completion, Picture, Request
from rollout.vllm.engine import Engine
from tests.support.patience import Deadline

PATIENCE_S = 300.0  # maximum seconds for one call
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.vllm_imported"])

_engine: Engine  # exists only in the process of a RemoteEngine


class VllmProcess:
    """A process that has imported vLLM. Exceptions of its calls are raised again in the test."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=SERVER, initializer=os.setsid)
        self._pid = self._pool.submit(os.getpid).result()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls an importable function in the process. The process is killed if the call does not return within
        PATIENCE_S seconds, or within the time limit of the test."""
        call, deadline = self._pool.submit(function, *arguments), Deadline(PATIENCE_S)
        try:
            while not call.done() and not deadline.passed():
                wait([call], timeout=min(PATIENCE_S, 1.0))
            return call.result(timeout=0)
        finally:
            if not call.done():
                self._kill()

    def close(self) -> None:
        """Ends the process, and the processes that vLLM has started there."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)


class RemoteEngine:
    """An object with the methods of an Engine. Each method calls the Engine in the other process."""

    def __init__(self, process: VllmProcess) -> None:
        self._process = process

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls an importable function in the other process, with the Engine as its first argument."""
        return self._process.run(_run, function, *arguments)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self.run(Engine.generate, requests)

    def score(self, token_ids: Sequence[int], images: Sequence[Picture] = ()) -> list[float]:
        return self.run(Engine.score, token_ids, images)

    def load(self, weights: Mapping[str, Any], step: int) -> None:
        self.run(Engine.load, weights, step)


@contextmanager
def vllm_process() -> Iterator[VllmProcess]:
    """A `with` block with a VllmProcess, which ends with the block."""
    process = VllmProcess()
    try:
        yield process
    finally:
        process.close()


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[RemoteEngine]:
    """A `with` block with an engine that serves a model folder, in float32 with at most 512 tokens unless `options` say
    something else. The engine and its process end with the block."""
    with vllm_process() as process:
        process.run(_start, str(folder), {"dtype": "float32", "max_sequence_length": 512} | options)
        yield RemoteEngine(process)
        process.run(_run, Engine.close)


def _start(folder: str, options: Mapping[str, Any]) -> None:
    global _engine
    _engine = Engine(folder, **options)


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(_engine, *arguments)


def shared_memory_segments() -> set[str]:
    """Returns the names of all shared memory segments on this machine that Python has made."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}
