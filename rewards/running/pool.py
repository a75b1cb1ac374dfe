"""Worker processes for rewards that compute. They take jobs from a queue and return outcomes.

A turn is the permission to take a job. There are `workers` turns. A process takes a job only if it has a turn. A
process that dies is replaced at once. A process whose job takes longer than usual gives its turn to a reserve process.
If the job takes even longer, the process computes only on idle cores. At the job's time limit, the process is killed.
So a hung sample hardly slows down other samples. Tested in tests/rewards/running/test_runner.py.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from rewards.running.process import ComputeProcess, ProcessDied, SetupFailed
from rewards.running.worker import WorkerSetup
from rl.types import Prompt, Rollout

Outcome = Mapping[str, Any]
"""The result for one rollout or row. After success: {"value": number, "details": mapping}. If it is invalid:
{"invalid": reason}. If time or memory ran out: {"exhausted": message}. If an endpoint does not answer: {"away": name of
the endpoint, "why": error, "status": HTTP status or None, "answers_others": whether the endpoint answered other samples
at the same time}. The key "seconds", if present, is the duration of scoring."""

SLOW_FACTOR = 3  # a job is slow if it takes more than SLOW_FACTOR times the usual duration of its scorer
# No job is slow before LEAST_PATIENCE_S seconds. A scorer's first job is slow after FIRST_PATIENCE_S seconds.
LEAST_PATIENCE_S, FIRST_PATIENCE_S = 0.25, 1.0
HUNG_S = 1.0  # if a job takes longer than this, its process gets only idle cores, and is replaced after the job
MOST_RESERVES = 8


@dataclass
class Job:
    """The work of one call of a scorer (a reward, penalty or row judge): the rollouts or the data row to score.

    If `retry_on_death` is True, a job whose process dies is tried once more, because a single death may have another
    cause than the scored text. If the process dies again, the text is the likely cause, and the outcome is "exhausted".
    `unanswered` counts how often an endpoint failed on this job while it answered other jobs.
    """

    scorer: str
    items: Sequence[Rollout | Prompt]
    timeout_s: float
    retry_on_death: bool
    outcomes: Future[list[Outcome]] = field(default_factory=Future)
    unanswered: int = 0

    def same_outcome(self, kind: str, why: object) -> list[Outcome]:
        """Returns the same outcome for each item."""
        return [{kind: str(why)}] * len(self.items)


class Countdown:
    """Sets the result of a future when `done` has been called `count` times. The result is the number of seconds since
    this object was created."""

    def __init__(self, count: int, future: Future[float]):
        self.left, self.future, self.start = count, future, time.monotonic()
        self.failed: str | None = None
        self.lock = threading.Lock()

    def done(self, failed: str | None) -> None:
        """Counts one call. `failed` is an error message, or None."""
        with self.lock:
            self.left -= 1
            self.failed = self.failed or failed
            if self.left:
                return
        if self.failed:
            self.future.set_exception(RuntimeError(self.failed))
        else:
            self.future.set_result(time.monotonic() - self.start)


class RewardPool:
    """Base class of ComputePool and AsyncPool. The processes load scorers and score jobs. start() or the first job
    starts the processes."""

    def __init__(self, setup: WorkerSetup, setup_s: float):
        self.setup, self.setup_s = setup, setup_s
        self.closed = False
        self._started: Future[float] | None = None
        self._lock = threading.Lock()

    def start(self) -> Future[float]:
        """Starts the processes, which load every scorer in the background (see RewardRunner.start)."""
        with self._lock:
            if self.closed:
                raise RuntimeError("these reward workers are closed")
            if self._started is None:
                self._started = Future()
                if self.setup.scorers:
                    atexit.register(self.close)
                    self._start(self._started)
                else:
                    self._started.set_result(0.0)
            return self._started

    def _start(self, ready: Future[float]) -> None:
        """Starts to load the scorers. `ready` gets the seconds that loading took, or RuntimeError."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class ComputePool(RewardPool):
    """Has `workers` processes and at least one reserve process. Each process loads every scorer."""

    def __init__(self, setup: WorkerSetup, workers: int, setup_s: float):
        super().__init__(setup, setup_s)
        self.workers = workers
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.turns = threading.Semaphore(workers)  # a process takes a job only if it has a turn
        self._slots: list[_Slot] = []
        self._stuck = 0  # number of slots that gave away their turn and still have a job
        self._usual_s: dict[str, float] = {}

    def _start(self, ready: Future[float]) -> None:
        countdown = Countdown(self.workers, ready)
        for _ in range(self.workers):
            self._add_slot(countdown.done)
        ready.add_done_callback(lambda _: self._keep_reserve())

    def put(self, job: Job) -> None:
        """Queues a job. The next free process scores the job and sets the result of `job.outcomes`."""
        self.start()
        self.jobs.put(job)

    def close(self) -> None:
        """Ends all processes, even in the middle of a job. Cancels unfinished jobs."""
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

    def patience_s(self, scorer: str) -> float:
        """Returns the seconds after which a job of this scorer counts as slow."""
        usual = self._usual_s.get(scorer)
        return FIRST_PATIENCE_S if usual is None else max(LEAST_PATIENCE_S, SLOW_FACTOR * usual)

    def record_duration(self, scorer: str, seconds: float) -> None:
        usual = self._usual_s.get(scorer, seconds)
        self._usual_s[scorer] = 0.9 * usual + 0.1 * seconds

    def give_turn(self, *, grow: bool) -> bool:
        """Gives the caller's turn to a reserve process if a job is waiting. Returns True if the turn was given away.

        If `grow` is True and no reserve process is free, starts another reserve process.
        """
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

    def stuck_job_ended(self) -> None:
        """A slot that gave away its turn calls this method when its job has ended."""
        with self._lock:
            self._stuck -= 1

    def keeps(self, slot: "_Slot") -> bool:
        """Returns True if the pool still needs `slot`, whose process has ended. Otherwise removes the slot and returns
        False."""
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
        self._add_slot(lambda failed: None)  # a failed setup is reported by the first job of the reserve process

    def _add_slot(self, ready: Callable[[str | None], None]) -> None:
        self._slots.append(_Slot(self))
        self._slots[-1].start(ready)


class _Slot:
    """A thread with its worker process.

    The kernel kills a worker process when the thread that started it ends. So only this thread starts the worker
    process and the processes that replace it, and the thread ends after the last process.
    """

    def __init__(self, pool: ComputePool):
        self.pool = pool
        self.process: ComputeProcess | None = None
        self.stuck = False  # True if the current job is slow and another slot has this slot's turn
        self.hung = False  # True if the job took so long that the process lost its priority
        self.lock = threading.Lock()  # so that no process is started after close() has killed all processes
        self.thread: threading.Thread | None = None

    def start(self, ready: Callable[[str | None], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(ready,), name="rewards", daemon=True)
        self.thread.start()

    def kill(self) -> None:
        with self.lock:
            if self.process:
                self.process.kill()

    def join(self) -> None:
        if self.thread:
            self.thread.join()

    def _run(self, ready: Callable[[str | None], None]) -> None:
        try:
            ready(self._load())
            while self._run_next_job():
                pass
        finally:
            self._terminate()

    def _run_next_job(self) -> bool:
        """Waits for a turn and runs one job. Returns False if the slot should end."""
        self.pool.turns.acquire()
        self.stuck = self.hung = False
        try:
            job = None if self.pool.closed else self.pool.jobs.get()
            if job and job.outcomes.set_running_or_notify_cancel():
                self._run_job(job)
        finally:
            if self.stuck:
                self.pool.stuck_job_ended()
            else:
                self.pool.turns.release()
        if self.hung:
            self._terminate()
            if not self.pool.keeps(self):
                return False
            self._load()
        return job is not None

    def _load(self) -> str | None:
        """Loads every scorer. Returns an error message if a scorer cannot be loaded, else None."""
        failed: str | None = None
        for scorer in self.pool.setup.scorers:
            try:
                self._running_process().load(scorer, self.pool.setup_s)
            except (SetupFailed, ProcessDied, CancelledError) as e:
                failed = failed or f"reward {scorer}: {e or 'closed while it was set up'}"
                self._terminate()
        return failed

    def _run_job(self, job: Job) -> None:
        start = time.monotonic()
        try:
            outcomes = self._outcomes(job)
        except BaseException as e:  # the code that waits for the job must see every error
            job.outcomes.set_exception(e)
        else:
            seconds = time.monotonic() - start
            if not self.stuck:
                self.pool.record_duration(job.scorer, seconds)
            job.outcomes.set_result([{**outcome, "seconds": seconds / len(outcomes)} for outcome in outcomes])

    def _outcomes(self, job: Job) -> list[Outcome]:
        try:
            return self._score(job)
        except ProcessDied as e:
            first_death = e
        if not job.retry_on_death:
            return job.same_outcome("invalid", first_death)
        try:
            return self._score(job)
        except ProcessDied as e:
            return job.same_outcome("exhausted", e)

    def _score(self, job: Job) -> list[Outcome]:
        pool = self.pool
        try:
            outcomes, retire = self._running_process().score(
                job.scorer, job.items, pool.setup_s, job.timeout_s, pool.patience_s(job.scorer), self._on_slow
            )
        except ProcessDied:
            if pool.closed:
                raise CancelledError from None
            self._replace()
            raise
        except SetupFailed as e:
            self._replace()
            return job.same_outcome("invalid", e)
        except TimeoutError as e:
            self._replace()
            return job.same_outcome("exhausted", e)
        if retire:
            self._replace()
        return list(outcomes)

    def _on_slow(self, seconds: float) -> bool:
        """Gives away the turn if another job is waiting. Returns True if the process has lost its priority; then this
        method is not called again for the job."""
        late = seconds >= HUNG_S
        self.stuck = self.stuck or self.pool.give_turn(grow=late)
        if self.stuck and late:
            self.hung = True
            self._running_process().lower_priority()
        return self.hung

    def _running_process(self) -> ComputeProcess:
        """Returns the slot's process. If the slot has no process, starts one. Raises CancelledError if the pool is
        closed."""
        with self.lock:
            if self.pool.closed:
                raise CancelledError
            if self.process is None:
                self.process = ComputeProcess(self.pool.setup)
            return self.process

    def _replace(self) -> None:
        """Ends the process. If the job was not hung, starts a new process. The new process starts up while the outcome
        is delivered."""
        self._terminate()
        if not self.hung:
            self._running_process()

    def _terminate(self) -> None:
        with self.lock:
            process, self.process = self.process, None
            if process:
                process.terminate()
