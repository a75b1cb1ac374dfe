"""Processes that work together in a test, such as the ranks of a model; none of them outlives the test."""

import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any


def run_together(target: Callable[..., object], arguments: Sequence[tuple[Any, ...]], *, limit_s: float) -> None:
    """Calls `target` with each of `arguments` in a process of its own, all at once, and waits for them.

    Whatever happens here, pytest's own time limit included, the processes are killed.

    Raises: TimeoutError if one of them takes longer than `limit_s` seconds; RuntimeError if one of them fails.
    """
    # Daemonic, because an interpreter that ends waits for other kinds of processes.
    processes = [get_context("spawn").Process(target=target, args=given, daemon=True) for given in arguments]
    deadline = time.monotonic() + limit_s
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise TimeoutError(f"{process.name} has not ended after {limit_s} s")
            if process.exitcode:
                raise RuntimeError(f"{process.name} has failed with exit code {process.exitcode}")
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
