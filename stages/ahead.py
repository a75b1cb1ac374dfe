"""Runs work for the next iteration in a second thread, while the main thread works on the current iteration.

With rollout.max_staleness: 1, the second thread samples the next iteration while the current iteration trains. In a
curation, judges score the next block of data rows in the second thread.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.2
PATIENCE_S = 10.0  # seconds that `abandon` waits for the thread to end


class Abandoned(Exception):
    """Raised in the second thread when the result of this thread is no longer needed."""


class Ahead(Generic[T]):
    """Runs at most one task at a time in a second thread."""

    def __init__(self) -> None:
        self._task: tuple[int, Future[T], threading.Thread] | None = None
        self._abandoned = threading.Event()

    def start(self, iteration: int, make: Callable[[], T]) -> None:
        """Starts `make()` in the second thread. `make` must call `check` repeatedly.

        Args:
            iteration: the number of the iteration (or of the block of rows) that `make` works for.
        """
        if self._task is not None:
            raise RuntimeError(f"the result of task {self._task[0]} has not been taken yet")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(make())
            except BaseException as error:  # `take` raises this error in the main thread
                future.set_exception(error)

        thread = threading.Thread(target=run, name=f"ahead for {iteration}", daemon=True)
        self._task = iteration, future, thread
        thread.start()

    def has(self, iteration: int) -> bool:
        """True if a task was started for this iteration, and `take` has not returned the result yet."""
        return self._task is not None and self._task[0] == iteration

    def take(self, iteration: int, meanwhile: Callable[[], None]) -> T:
        """Waits for this iteration's task and returns the task's result. Calls `meanwhile` every POLL_S while it waits.

        Raises: the exception that the task has raised, if the task failed.
        """
        if self._task is None or self._task[0] != iteration:
            raise RuntimeError(f"task {iteration} was not started")
        future = self._task[1]
        while not wait([future], timeout=POLL_S).done:
            meanwhile()
        self._task = None
        return future.result()

    def settle(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Waits until the task, if there is one, has ended. Calls `meanwhile` every POLL_S while it waits."""
        while self._task is not None and not wait([self._task[1]], timeout=POLL_S).done:
            meanwhile()

    def check(self) -> None:
        """Raises Abandoned if the result of this thread is no longer needed."""
        if self._abandoned.is_set():
            raise Abandoned

    def abandon(self) -> None:
        """Makes the second thread end at its next call of `check`. The result of the thread is lost."""
        if self._task is not None:
            self._abandoned.set()
            self._task[2].join(PATIENCE_S)
            self._task = None
