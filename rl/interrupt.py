"""Ends a run after Ctrl-C or SIGTERM. The run ends between two updates, after it has saved a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Raised between two updates if the run has received a signal to stop.

    This class is a BaseException, so that `except Exception` does not catch it.
    """


class Interrupts:
    """Raises `Interrupted` after the first SIGINT or SIGTERM. Inside a `waiting()` block, the exception is raised at
    once. Elsewhere, the next `check()` raises the exception.

    The second signal ends the process without saving.
    """

    def __init__(self) -> None:
        self.stop_requested, self._waiting = False, False

    @contextmanager
    def installed(self) -> Iterator["Interrupts"]:
        """Handles SIGINT and SIGTERM inside the `with` block. The end of the block restores the earlier handlers."""
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a `with` block in which no weights change. A signal that arrives inside the block raises `Interrupted`
        at once."""
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
        if self.stop_requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_requested = True
        if self._waiting:
            self._waiting = False
            raise Interrupted
