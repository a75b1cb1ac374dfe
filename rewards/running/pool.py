"""Worker processes kept alive for rewards that compute: jobs in, outcomes out.

`workers` of them compute at a time. One that dies is replaced at once. One whose job takes longer than its like gives
its turn to a reserve; if it goes on, it computes only when the cores are idle, and is killed when its time is up: a
hung sample costs the others next to nothing.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from rewards.running.process import Died, SetupFailed, WorkerProcess
from rewards.running.worker import Orders
from rl.types import Prompt, Rollout

Outcome = Mapping[str, Any]
"""What became of a rollout: {"value", "details"}, {"invalid": why}, {"exhausted": what ran out} or {"away": endpoint,
"why"}; and the "seconds" it took."""

LONG = 3  # times the usual duration after which a job gives up its turn
LEAST_PATIENCE_S, FIRST_PATIENCE_S = 0.25, 1.0  # but never sooner than this; while nothing is known of its like
HUNG_S = 1.0  # after which it may only use idle cores, which costs its process: there is no way back
MOST_RESERVES = 8


@dataclass(frozen=True)
class Job:
    """Rollouts to be scored together by one unit (a reward with its parameters), or one row for a row judge.

    With `again`, a sample whose process dies is tried once more, and a second death counts as exhaustion: one
    that the text causes repeats itself, any other must not cost the sample.
    """

    unit: str
    rollouts: Sequence[Rollout | Prompt]
    timeout_s: float
    again: bool
    outcomes: Future[list[Outcome]] = field(default_factory=Future)

    def all(self, kind: str, why: object) -> list[Outcome]:
        """The same outcome for each of its rollouts."""
        return [{kind: str(why)}] * len(self.rollouts)


class Countdown:
    """Resolves a future with the seconds passed once `count` callers have said they are ready."""

    def __init__(self, count: int, future: Future[float]):
        self.left, self.future, self.start = count, future, time.monotonic()
        self.failed: str | None = None
        self.lock = threading.Lock()

    def done(self, failed: str | None) -> None:
        with self.lock:
            self.left -= 1
            self.failed = self.failed or failed
            if self.left:
                return
        if self.failed:
            self.future.set_exception(RuntimeError(self.failed))
        else:
            self.future.set_result(time.monotonic() - self.start)


class Pool:
    """What holds units and scores jobs with them; started by warm() or by the first job."""

    def __init__(self, orders: Orders, setup_s: float):
        self.orders, self.setup_s = orders, setup_s
        self.closed = False
        self._warm: Future[float] | None = None
        self._lock = threading.Lock()

    def warm(self) -> Future[float]:
        """Starts the processes and loads every unit in each, in the background; see RewardRunner.warm."""
        with self._lock:
            if self.closed:
                raise RuntimeError("these reward workers are closed")
            if self._warm is None:
                self._warm = Future()
                if self.orders.units:
                    atexit.register(self.close)
                    self._start(self._warm)
                else:
                    self._warm.set_result(0.0)
            return self._warm

    def _start(self, ready: Future[float]) -> None:
        """To begin loading; `ready` gets the seconds it took, or RuntimeError."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class WorkerPool(Pool):
    """`workers` processes, and one in reserve, that each hold every unit."""

    def __init__(self, orders: Orders, workers: int, setup_s: float):
        super().__init__(orders, setup_s)
        self.workers = workers
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.turns = threading.Semaphore(workers)  # one for each process that computes and is not stuck
        self._slots: list[_Slot] = []
        self._stuck = 0
        self._usual_s: dict[str, float] = {}

    def _start(self, ready: Future[float]) -> None:
        countdown = Countdown(self.workers, ready)
        for _ in range(self.workers):
            self._add(countdown.done)
        ready.add_done_callback(lambda _: self._keep_reserve())

    def put(self, job: Job) -> None:
        """Queues a job; its future is resolved by the next free worker."""
        self.warm()
        self.jobs.put(job)

    def close(self) -> None:
        """Ends all processes, also those in the middle of a job. Unfinished jobs are cancelled."""
        with self._lock:
            self.closed = True
            slots = list(self._slots)
        atexit.unregister(self.close)
        for slot in slots:
            self.jobs.put(None)
            slot.kill()
        self.turns.release(max(1, len(slots)))
        for slot in slots:
            slot.join()
        while not self.jobs.empty():
            if job := self.jobs.get():
                job.outcomes.cancel()

    def patience_s(self, unit: str) -> float:
        """Seconds after which a job of this unit is longer than any of its like."""
        usual = self._usual_s.get(unit)
        return FIRST_PATIENCE_S if usual is None else max(LEAST_PATIENCE_S, LONG * usual)

    def took(self, unit: str, seconds: float) -> None:
        usual = self._usual_s.get(unit, seconds)
        self._usual_s[unit] = 0.9 * usual + 0.1 * seconds

    def give_turn(self, *, grow: bool) -> bool:
        """Hands the caller's turn to a reserve, if a job waits for one; with `grow` a reserve is made if none is
        left. Whether the turn was given."""
        with self._lock:
            if self.closed or self.jobs.empty():
                return False
            if len(self._slots) - self._stuck <= self.workers:
                if not grow or len(self._slots) >= self.workers + MOST_RESERVES:
                    return False
                self._add_reserve()
            self._stuck += 1
        self.turns.release()
        return True

    def back(self) -> None:
        """The job of one that had given its turn has ended."""
        with self._lock:
            self._stuck -= 1

    def is_needed(self, slot: "_Slot") -> bool:
        """Whether `slot`, which has no process any more, should go on; if not, it is forgotten."""
        with self._lock:
            if len(self._slots) - self._stuck <= self.workers + 1:
                return True
            self._slots.remove(slot)
            return False

    def _keep_reserve(self) -> None:
        with self._lock:
            if not self.closed:
                self._add_reserve()

    def _add_reserve(self) -> None:
        self._add(lambda failed: None)  # one that can't be set up says so when it is used

    def _add(self, ready: Callable[[str | None], None]) -> None:
        self._slots.append(_Slot(self))
        self._slots[-1].start(ready)


class _Slot:
    """One thread and the process it keeps alive. Only this thread starts processes, and it outlives them: the
    kernel ends a worker together with the thread that started it."""

    def __init__(self, pool: WorkerPool):
        self.pool = pool
        self.worker: WorkerProcess | None = None
        self.stuck = False  # on its current job; its turn is with another slot
        self.hung = False  # on that job for so long that its process lost its priority
        self.lock = threading.Lock()  # so that no process is started behind close()'s back
        self.thread: threading.Thread | None = None

    def start(self, ready: Callable[[str | None], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(ready,), name="rewards", daemon=True)
        self.thread.start()

    def kill(self) -> None:
        with self.lock:
            if self.worker:
                self.worker.kill()

    def join(self) -> None:
        if self.thread:
            self.thread.join()

    def _run(self, ready: Callable[[str | None], None]) -> None:
        try:
            ready(self._load())
            while self._next():
                pass
        finally:
            self._drop()

    def _next(self) -> bool:
        """One job in one turn; whether there may be more."""
        self.pool.turns.acquire()
        self.stuck = self.hung = False
        try:
            job = None if self.pool.closed else self.pool.jobs.get()
            if job and job.outcomes.set_running_or_notify_cancel():
                self._serve(job)
        finally:
            if self.stuck:
                self.pool.back()
            else:
                self.pool.turns.release()
        if self.hung:
            self._drop()
            if not self.pool.is_needed(self):
                return False
            self._load()
        return job is not None

    def _load(self) -> str | None:
        """Loads every unit; why that failed, or None."""
        failed: str | None = None
        for unit in self.pool.orders.units:
            try:
                self._process().load(unit, self.pool.setup_s)
            except (SetupFailed, Died, CancelledError) as e:
                failed = failed or f"reward {unit}: {e or 'closed while it was set up'}"
                self._drop()
        return failed

    def _serve(self, job: Job) -> None:
        began = time.monotonic()
        try:
            outcomes = self._outcomes(job)
        except BaseException as e:  # whoever waits for the job must hear of it, whatever it is
            job.outcomes.set_exception(e)
        else:
            seconds = time.monotonic() - began
            if not self.stuck:
                self.pool.took(job.unit, seconds)
            job.outcomes.set_result([{**outcome, "seconds": seconds / len(outcomes)} for outcome in outcomes])

    def _outcomes(self, job: Job) -> list[Outcome]:
        try:
            return self._score(job)
        except Died as e:
            first = e
        if not job.again:
            return job.all("invalid", first)
        try:
            return self._score(job)
        except Died as e:
            return job.all("exhausted", e)

    def _score(self, job: Job) -> list[Outcome]:
        pool = self.pool
        try:
            outcomes, retire = self._process().score(
                job.unit, job.rollouts, pool.setup_s, job.timeout_s, pool.patience_s(job.unit), self._takes_long
            )
        except Died:
            if pool.closed:
                raise CancelledError from None
            self._replace()
            raise
        except SetupFailed as e:
            self._replace()
            return job.all("invalid", e)
        except TimeoutError as e:
            self._replace()
            return job.all("exhausted", e)
        if retire:
            self._replace()
        return list(outcomes)

    def _takes_long(self, seconds: float) -> bool:
        """Makes room for others, who wait; whether there is no more to do."""
        late = seconds >= HUNG_S
        self.stuck = self.stuck or self.pool.give_turn(grow=late)
        if self.stuck and late:
            self.hung = True
            self._process().yield_cores()
        return self.hung

    def _process(self) -> WorkerProcess:
        with self.lock:
            if self.pool.closed:
                raise CancelledError
            if self.worker is None:
                self.worker = WorkerProcess(self.pool.orders)
            return self.worker

    def _replace(self) -> None:
        """Starts the next process right away: it comes up while the outcome is on its way."""
        self._drop()
        if not self.hung:
            self._process()

    def _drop(self) -> None:
        with self.lock:
            worker, self.worker = self.worker, None
            if worker:
                worker.bury()
