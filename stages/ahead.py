"""Work for the next iteration in a second thread, while the main thread works on this iteration.

With rollout.max_staleness: 1 it makes the next iteration's samples while this iteration trains. In a curation it makes
the next block's judgements.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.2
PATIENCE_S = 10.0  # how long `abandon` waits for the thread to end


class Abandoned(Exception):
    """Raised in the thread when its result is not needed any more."""


class Ahead(Generic[T]):
    """Runs at most one task at a time in a second thread."""

    def __init__(self) -> None:
        self._task: tuple[int, Future[T], threading.Thread] | None = None
        self._abandoned = threading.Event()

    def start(self, iteration: int, make: Callable[[], T]) -> None:
        """Begins `make()` for an iteration (or a block). `make` should call `check` now and then."""
        if self._task is not None:
            raise RuntimeError(f"the result for {self._task[0]} has not been taken yet")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(make())
            except BaseException as error:  # raised again by `take`
                future.set_exception(error)

        thread = threading.Thread(target=run, name=f"ahead for {iteration}", daemon=True)
        self._task = iteration, future, thread
        thread.start()

    def has(self, iteration: int) -> bool:
        """True if a task was started for this iteration and its result was not taken."""
        return self._task is not None and self._task[0] == iteration

    def take(self, iteration: int, meanwhile: Callable[[], None]) -> T:
        """Waits for the task of this iteration and returns its result. Calls `meanwhile` every POLL_S.

        Raises: what the task raised.
        """
        if self._task is None or self._task[0] != iteration:
            raise RuntimeError(f"nothing was started for {iteration}")
        future = self._task[1]
        while not wait([future], timeout=POLL_S).done:
            meanwhile()
        self._task = None
        return future.result()

    def settle(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Waits until the task, if there is one, has returned or failed. Calls `meanwhile` every POLL_S."""
        while self._task is not None and not wait([self._task[1]], timeout=POLL_S).done:
            meanwhile()

    def check(self) -> None:
        """Raises Abandoned if the result of the thread is not needed any more."""
        if self._abandoned.is_set():
            raise Abandoned

    def abandon(self) -> None:
        """Ends the thread at its next `check` and drops its result."""
        if self._task is not None:
            self._abandoned.set()
            self._task[2].join(PATIENCE_S)
            self._task = None
