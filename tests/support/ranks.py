"""Runs processes that work together in a test, such as the ranks of a model. All processes end with the test."""

from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

from tests.support.patience import Deadline


def run_together(target: Callable[..., object], arguments: Sequence[tuple[Any, ...]], *, limit_s: float) -> None:
    """Calls `target` once per entry of `arguments`. Each call runs in its own process. Waits until all calls have
    ended.

    At the end, all processes that still run are killed, even after a time-out of pytest.

    Raises: TimeoutError if the calls take longer than `limit_s` seconds; RuntimeError if a call fails.
    """
    # The processes are daemons, so that the interpreter does not wait for them when it ends.
    processes = [get_context("spawn").Process(target=target, args=given, daemon=True) for given in arguments]
    deadline = Deadline(limit_s)
    try:
        for process in processes:
            process.start()
        for process in processes:
            while process.is_alive() and not deadline.passed():
                process.join(min(limit_s, 1.0))
            if process.exitcode is None:
                raise TimeoutError(f"{process.name} has not ended after {limit_s} s")
            if process.exitcode:
                raise RuntimeError(f"{process.name} has failed with exit code {process.exitcode}")
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
