"""Ends a command after SIGINT (Ctrl-C), SIGTERM or SIGHUP. A run ends between two updates, after it has saved a
checkpoint."""

import asyncio
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
"""The signals that end a command."""
KILLING = (signal.SIGINT, signal.SIGTERM)  # the second signal of the same kind ends the process without saving
REPEAT_S = 1.0  # the program `timeout` sends SIGTERM twice; a repetition within this time counts as the same signal
T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """Raised if a signal asks the command to stop. A run raises it only between two updates.

    `except Exception` does not catch a KeyboardInterrupt, and asyncio does not keep it in a task.
    """


@contextmanager
def also_stopped_by(name: str | None) -> Iterator[None]:
    """A `with` block in which one more signal, for example "SIGUSR1", ends the command. None: no signal is added."""
    added = [signal.Signals[name]] if name else []
    SIGNALS.extend(added)
    try:
        yield
    finally:
        for number in added:
            SIGNALS.remove(number)


class Interrupts:
    """Calls `wake` after the first signal. Inside a `waiting()` block, `wake` is called at once. Elsewhere, the next
    `check()` raises Interrupted.

    The second SIGINT, or the second SIGTERM, ends the process without saving.

    Args:
        wake: ends the `waiting()` block. By default it raises Interrupted.
    """

    def __init__(self, wake: Callable[[], object] | None = None) -> None:
        self._wake = wake or self.check
        self._received: dict[int, float] = {}  # signal -> time of its first arrival
        self._waiting = False

    @property
    def stop_requested(self) -> bool:
        """True if a signal has arrived."""
        return bool(self._received)

    @contextmanager
    def installed(self) -> Iterator["Interrupts"]:
        """Handles SIGNALS inside the `with` block. The end of the block restores the earlier handlers.

        If the command was started with `nohup`, it ignores SIGHUP. Outside of the main thread, nothing is handled.
        """
        handled = [s for s in SIGNALS if not (s == signal.SIGHUP and signal.getsignal(s) == signal.SIG_IGN)]
        main = threading.current_thread() is threading.main_thread()
        before = {s: signal.signal(s, self._handle) for s in handled} if main else {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a `with` block in which no weights change. A signal that arrives inside the block ends the block at
        once."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.stop_requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in KILLING and now - self._received.get(number, now) > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if number == signal.SIGHUP:
            _leave_terminal()
        self._received.setdefault(number, now)
        if self._waiting:
            self._waiting = False
            self._wake()


def _leave_terminal() -> None:
    """Discards further output to a terminal, because writing to a closed terminal is an error."""
    for stream in (sys.__stdout__, sys.__stderr__):
        # isatty() is False for a closed terminal.
        if stream is not None and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end and returns its result. If a signal arrives, the coroutine is cancelled, so that it
    can clean up, and Interrupted is raised."""

    async def main() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        interrupts = Interrupts(wake=lambda: loop.call_soon_threadsafe(task.cancel))
        with interrupts.installed(), interrupts.waiting():
            try:
                return await work
            except asyncio.CancelledError:
                interrupts.check()
                raise

    return asyncio.run(main())
