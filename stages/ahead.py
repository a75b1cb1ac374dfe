"""What comes next, made in a thread of its own while the main one works: the next iteration's samples, while this one
trains (rollout.max_staleness: 1), or the next block's judgements in a curation."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.2
PATIENCE_S = 10.0  # how long `abandon` waits for the thread to notice


class Abandoned(Exception):
    """Raised in the thread: nobody wants the result any more."""


class Ahead(Generic[T]):
    """At most one task that runs beside the main thread."""

    def __init__(self) -> None:
        self._task: tuple[int, Future[T], threading.Thread] | None = None
        self._unwanted = threading.Event()

    def start(self, iteration: int, make: Callable[[], T]) -> None:
        """Begin `make()` for an iteration (or a block); it should call `check` now and then."""
        if self._task is not None:
            raise RuntimeError(f"what was made for {self._task[0]} has not been taken yet")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(make())
            except BaseException as error:  # handed on to whoever takes the result
                future.set_exception(error)

        thread = threading.Thread(target=run, name=f"ahead for {iteration}", daemon=True)
        self._task = iteration, future, thread
        thread.start()

    def has(self, iteration: int) -> bool:
        """Whether this iteration's was started and not taken."""
        return self._task is not None and self._task[0] == iteration

    def take(self, iteration: int, meanwhile: Callable[[], None]) -> T:
        """What was started for this iteration, waited for; calls `meanwhile` every POLL_S.

        Raises what making them raised."""
        if self._task is None or self._task[0] != iteration:
            raise RuntimeError(f"nothing was started for {iteration}")
        future = self._task[1]
        while not wait([future], timeout=POLL_S).done:
            meanwhile()
        self._task = None
        return future.result()

    def settle(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until the task, if there is one, has ended, well or not; calls `meanwhile` every POLL_S."""
        while self._task is not None and not wait([self._task[1]], timeout=POLL_S).done:
            meanwhile()

    def check(self) -> None:
        """Raises Abandoned in a thread whose result is not wanted any more."""
        if self._unwanted.is_set():
            raise Abandoned

    def abandon(self) -> None:
        """End the thread at its next `check`, without its result."""
        if self._task is not None:
            self._unwanted.set()
            self._task[2].join(PATIENCE_S)
            self._task = None
