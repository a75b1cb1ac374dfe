"""Ctrl-C and SIGTERM end a run where nothing is lost: between updates, with a checkpoint to resume from."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The run was asked to stop and stands at an iteration's border. Not an Exception: nothing may swallow it."""


class Interrupts:
    """Turns the first SIGINT or SIGTERM into `Interrupted`, at once while `waiting()`, else at the next `check()`.

    The second signal is Python's own: it ends the process without saving.
    """

    def __init__(self) -> None:
        self.asked, self._waiting = False, False

    @contextmanager
    def installed(self) -> Iterator["Interrupts"]:
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In this block no weights change, so it can be left at any moment."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raises Interrupted if the run was asked to stop."""
        if self.asked:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if self._waiting:
            self._waiting = False
            raise Interrupted
