"""Worker processes kept alive: jobs in, outcomes out. A worker that hangs or dies is replaced at once."""

import atexit
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.process import Died, SetupFailed, WorkerProcess
from rewards.worker import Task
from rl.types import Rollout

Outcome = Mapping[str, Any]
"""What became of a rollout: {"value", "details"}, {"invalid": why} or {"exhausted": what ran out}."""


@dataclass(frozen=True)
class Job:
    """Rollouts to be scored together.

    With `again`, a sample whose process dies is tried once more, and a second death counts as exhaustion: one
    that the text causes repeats itself, any other must not cost the sample.
    """

    task: str
    rollouts: Sequence[Rollout]
    timeout_s: float
    again: bool
    outcomes: Future[list[Outcome]] = field(default_factory=Future)


class WorkerPool:
    """`workers` processes that each hold every task's reward; started by warm() or by the first job."""

    def __init__(self, tasks: Mapping[str, Task], base_dir: Path, workers: int, setup_s: float):
        self.tasks, self.base_dir, self.setup_s = dict(tasks), base_dir, setup_s
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.closed = False
        self._slots = [_Slot(self) for _ in range(workers)]
        self._warm: Future[float] | None = None
        self._lock = threading.Lock()

    def warm(self) -> Future[float]:
        """Starts the processes and loads every reward in each, in the background; see RewardRunner.warm."""
        with self._lock:
            if self.closed:
                raise RuntimeError("these reward workers are closed")
            if self._warm is None:
                self._warm = Future()
                atexit.register(self.close)
                ready = _Countdown(len(self._slots), self._warm)
                for slot in self._slots:
                    slot.start(ready)
            return self._warm

    def put(self, job: Job) -> None:
        """Queues a job; its future is resolved by the next free worker."""
        self.warm()
        self.jobs.put(job)

    def close(self) -> None:
        """Ends all processes, also those in the middle of a job. Unfinished jobs are cancelled."""
        with self._lock:
            self.closed = True
        atexit.unregister(self.close)
        for slot in self._slots:
            self.jobs.put(None)
            slot.kill()
        for slot in self._slots:
            slot.join()
        while not self.jobs.empty():
            if job := self.jobs.get():
                job.outcomes.cancel()


class _Countdown:
    """Resolves a future with the seconds passed once `count` slots have said they are ready."""

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


class _Slot:
    """One thread and the process it keeps alive. Only this thread starts processes, and it outlives them: the
    kernel ends a worker together with the thread that started it."""

    def __init__(self, pool: WorkerPool):
        self.pool = pool
        self.worker: WorkerProcess | None = None
        self.lock = threading.Lock()  # so that no process is started behind close()'s back
        self.thread: threading.Thread | None = None

    def start(self, ready: _Countdown) -> None:
        self.thread = threading.Thread(target=self._run, args=(ready,), name="rewards", daemon=True)
        self.thread.start()

    def kill(self) -> None:
        with self.lock:
            if self.worker:
                self.worker.kill()

    def join(self) -> None:
        if self.thread:
            self.thread.join()

    def _run(self, ready: _Countdown) -> None:
        try:
            ready.done(self._load())
            while not self.pool.closed and (job := self.pool.jobs.get()):
                if job.outcomes.set_running_or_notify_cancel():
                    self._serve(job)
        finally:
            self._drop()

    def _load(self) -> str | None:
        """Loads every task's reward; why that failed, or None."""
        failed: str | None = None
        for task in self.pool.tasks:
            try:
                self._process().load(task, self.pool.setup_s)
            except (SetupFailed, Died, CancelledError) as e:
                failed = failed or f"rewards.{task}: {e or 'closed while it was set up'}"
                self._drop()
        return failed

    def _serve(self, job: Job) -> None:
        try:
            outcomes = self._outcomes(job)
        except BaseException as e:  # whoever waits for the job must hear of it, whatever it is
            job.outcomes.set_exception(e)
        else:
            job.outcomes.set_result(outcomes)

    def _outcomes(self, job: Job) -> list[Outcome]:
        try:
            return self._score(job)
        except Died as e:
            first = e
        if not job.again:
            return self._all(job, "invalid", first)
        try:
            return self._score(job)
        except Died as e:
            return self._all(job, "exhausted", e)

    def _score(self, job: Job) -> list[Outcome]:
        try:
            outcomes, retire = self._process().score(job.task, job.rollouts, self.pool.setup_s, job.timeout_s)
        except Died:
            self._replace()
            raise
        except SetupFailed as e:
            self._replace()
            return self._all(job, "invalid", e)
        except TimeoutError as e:
            self._replace()
            return self._all(job, "exhausted", e)
        if retire:
            self._replace()
        return list(outcomes)

    def _all(self, job: Job, kind: str, why: Exception) -> list[Outcome]:
        return [{kind: str(why)}] * len(job.rollouts)

    def _process(self) -> WorkerProcess:
        with self.lock:
            if self.pool.closed:
                raise CancelledError
            if self.worker is None:
                self.worker = WorkerProcess(self.pool.tasks, self.pool.base_dir)
            return self.worker

    def _replace(self) -> None:
        """Starts the next process right away: it comes up while the outcome is on its way."""
        self._drop()
        self._process()

    def _drop(self) -> None:
        with self.lock:
            worker, self.worker = self.worker, None
            if worker:
                worker.bury()
