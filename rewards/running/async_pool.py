"""A process for rewards that wait, such as rewards that ask a judge. It runs many jobs at a time.

If a job blocks or kills the process, the jobs that were running start again, first in two halves, then in smaller
groups, to find the job that is the cause. If an endpoint does not answer, the jobs that ask it wait. From time to time,
one of these jobs is sent as a probe, until the endpoint answers any job or its `max_wait` is over. If the endpoint
answers other jobs but fails on one job again and again, this job is invalid.
"""

import atexit
import itertools
import os
import pickle
import queue
import random
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import wait
from typing import Any

from rewards.running.pool import Job, Outcome, RewardPool
from rewards.running.process import AsyncProcess, ProcessDied, SetupFailed
from rewards.running.worker import WorkerSetup
from rl.stop import Stop

MOST_AT_ONCE = 1024  # maximum number of jobs in the process; each endpoint also has a limit, `concurrency`
MOST_BYTES = 256 << 20  # if the jobs in the process have this size, pictures included, no job is added
STALL_S = (2.0, 30.0)  # a process counts as blocked after this many seconds without a message: minimum, maximum
MOST_UNANSWERED = 3  # a job is invalid if an endpoint failed on it this many times while it answered other jobs
BUSY = (408, 409, 429)  # statuses of an endpoint that is busy; they do not depend on the job
PROBE_S = (2.0, 60.0)  # seconds between probes of an endpoint that does not answer: first pause and longest pause


class EndpointAway(Stop):
    """An endpoint did not answer for longer than its `max_wait`."""


@dataclass(frozen=True)
class Outage:
    """A report that an endpoint does not answer, or that it answers again.

    If the endpoint does not answer, `why` is the error. If it answers again, `why` is None. `seconds` is the time since
    the outage began. `again` is True if the same outage was reported before and continues.
    """

    endpoint: str
    why: str | None
    seconds: float = 0.0
    again: bool = False

    def __str__(self) -> str:
        if self.why is None:
            return f"endpoint {self.endpoint} is back after {self.seconds:.0f} s"
        return f"endpoint {self.endpoint} does not answer ({self.why})"


@dataclass(frozen=True)
class _Sent:
    """A job that is in the process."""

    job: Job
    size: int  # bytes


@dataclass
class _AwayEndpoint:
    """An endpoint that does not answer, and the jobs that wait for it."""

    since: float
    why: str
    probe_at: float
    pause_s: float
    held: list[Job] = field(default_factory=list)
    probe: Job | None = None

    def schedule_next_probe(self) -> None:
        """Sets a longer pause before the next probe. Call this when the endpoint has not answered a probe."""
        self.probe = None
        self.pause_s = min(PROBE_S[1], 2 * self.pause_s)
        self.probe_at = time.monotonic() + self.pause_s * random.uniform(0.8, 1.2)


class AsyncPool(RewardPool):
    """Runs jobs of async scorers. If an outage is longer than the endpoint's `max_wait`, the jobs that wait for the
    endpoint fail with EndpointAway.

    outages  a queue that gets an Outage when an outage begins, continues or ends
    """

    def __init__(self, setup: WorkerSetup, setup_s: float):
        super().__init__(setup, setup_s)
        self.outages: queue.SimpleQueue[Outage] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe()  # a byte in this pipe wakes the thread
        self._numbers = itertools.count()
        self._running: dict[int, _Sent] = {}
        # Groups of jobs that were running when the process ended. Each group is run again without other jobs.
        self._suspects: deque[list[Job]] = deque()
        self._on_trial = False  # True while a group of _suspects runs
        self._away: dict[str, _AwayEndpoint] = {}
        self._last_message = 0.0  # time when the process sent its last message
        self._process: AsyncProcess | None = None
        self._thread: threading.Thread | None = None

    def _start(self, ready: Future[float]) -> None:
        self._thread = threading.Thread(target=self._run, args=(ready,), name="async rewards", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queues a job."""
        self.start()
        self._jobs.put(job)
        os.write(self._wake_writer, b".")

    def close(self) -> None:
        """Ends the process and cancels unfinished jobs."""
        with self._lock:
            self.closed = True
            if self._wake_writer < 0:
                return
        atexit.unregister(self.close)
        os.write(self._wake_writer, b".")
        if self._thread:
            self._thread.join()
        for job in self._unfinished():
            job.outcomes.cancel()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        self._wake_reader = self._wake_writer = -1

    def _unfinished(self) -> list[Job]:
        held = [job for away in self._away.values() for job in (*away.held, away.probe) if job]
        running = (sent.job for sent in self._running.values())
        return [*running, *chain.from_iterable(self._suspects), *held, *self._queued()]

    def _run(self, ready: Future[float]) -> None:
        start = time.monotonic()
        try:
            self._start_process()
        except (SetupFailed, ProcessDied) as e:
            ready.set_exception(RuntimeError(str(e)))
        else:
            ready.set_result(time.monotonic() - start)
        try:
            while not self.closed:
                try:
                    self._step()
                except (SetupFailed, ProcessDied) as e:
                    self._on_process_lost(e)
        except BaseException as e:  # the code that waits for a job must see every error
            self.closed = True
            for job in self._unfinished():
                _fail(job, e)
            raise
        finally:
            self._terminate_process()

    def _start_process(self) -> None:
        """Starts a process and loads every scorer. On failure, ends the process and raises SetupFailed or
        ProcessDied."""
        self._process = AsyncProcess(self.setup)
        try:
            for scorer in self.setup.scorers:
                self._process.send_job(pickle.dumps((0, scorer, [], 0.0)))
                self._wait_until_loaded(scorer)
        except (SetupFailed, ProcessDied):
            self._terminate_process()
            raise
        self._last_message = time.monotonic()

    def _wait_until_loaded(self, scorer: str) -> None:
        deadline = time.monotonic() + self.setup_s
        while not self.closed:
            assert self._process
            try:
                reply = self._process.receive(min(0.2, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise SetupFailed(f"reward {scorer}: its setup took longer than {self.setup_s:g} s") from None
                continue
            if "failed" in reply:
                if reply["failed"]:
                    raise SetupFailed(f"reward {scorer}: {reply['failed']}")
                return

    def _terminate_process(self) -> None:
        process, self._process = self._process, None
        if process:
            process.terminate()

    def _step(self) -> None:
        """Sends the jobs that may run now. Then waits for an answer or a new job, for at most half a second."""
        self._probe_or_give_up()
        if self._process is None:
            if self._jobs.empty() and not self._suspects:
                self._wait_for([])
                return
            self._start_process()
        assert self._process
        self._send_jobs()
        ready = self._wait_for([self._process.connection])
        if self._process.connection in ready:
            self._last_message = time.monotonic()
            reply = self._process.receive(0)
            for endpoint in reply.get("answered", ()):
                self._on_endpoint_answered(endpoint)
            if "number" in reply:
                self._on_outcomes(self._running.pop(reply["number"]).job, reply["outcomes"])
        elif time.monotonic() - self._last_message > self._stall_s():
            raise ProcessDied(f"it blocked the event loop for {time.monotonic() - self._last_message:.0f} s")

    def _wait_for(self, connections: list[Any]) -> list[Any]:
        """Waits until a connection has a message, a job is queued, or half a second has passed. Returns the
        connections that have a message."""
        ready = wait([*connections, self._wake_reader], timeout=0.5)
        if self._wake_reader in ready:
            os.read(self._wake_reader, 4096)
        return ready

    def _stall_s(self) -> float:
        least, most = STALL_S
        return min([most, *(max(least, sent.job.timeout_s) for sent in self._running.values())])

    def _send_jobs(self) -> None:
        if self._on_trial:
            return
        if not self._suspects:
            while self._has_room() and not self._jobs.empty():
                self._send(self._jobs.get())
        elif not self._running:
            for job in self._suspects.popleft():
                self._send(job)
            self._on_trial = bool(self._running)

    def _has_room(self) -> bool:
        """True if the process may get one more job."""
        return len(self._running) < MOST_AT_ONCE and sum(sent.size for sent in self._running.values()) < MOST_BYTES

    def _queued(self) -> list[Job]:
        """Takes all jobs out of the queue."""
        jobs: list[Job] = []
        while not self._jobs.empty():
            jobs.append(self._jobs.get())
        return jobs

    def _send(self, job: Job) -> None:
        if job.outcomes.cancelled():
            return
        assert self._process
        number, items = next(self._numbers), list(job.items)
        message = pickle.dumps((number, job.scorer, items, job.timeout_s))
        self._running[number] = _Sent(job, len(message))
        self._process.send_job(message)

    def _on_outcomes(self, job: Job, outcomes: list[Outcome]) -> None:
        self._on_trial = self._on_trial and bool(self._running)
        if unreachable := next((outcome for outcome in outcomes if "away" in outcome), None):
            self._on_unreachable(job, unreachable)
            return
        for endpoint in [name for name, away in self._away.items() if away.probe is job]:
            self._on_endpoint_answered(endpoint)
        _resolve(job, outcomes)

    def _on_unreachable(self, job: Job, outcome: Outcome) -> None:
        """Handles a job whose endpoint did not answer. If the endpoint answered other jobs at the same time, the job
        is sent again, otherwise it waits until the endpoint answers."""
        endpoint, why = outcome["away"], outcome["why"]
        # If the endpoint failed on this job before, while it answered others, this may now be the only job left.
        alone = job.unanswered > 0 and endpoint not in self._away
        if not outcome["answers_others"] and not alone:
            self._hold(job, endpoint, why)
            return
        if outcome["status"] not in BUSY:
            job.unanswered += 1
        if job.unanswered < MOST_UNANSWERED:
            self._jobs.put(job)
        else:
            problem = f"endpoint {endpoint} answers other samples, but not this: {why}"
            _resolve(job, job.same_outcome("invalid", problem))

    def _on_process_lost(self, error: Exception) -> None:
        """Handles a process that has ended or cannot be set up. If the process cannot be set up, all jobs get invalid
        outcomes. If the process has ended, the jobs that were running are run again in two halves. If the process ends
        while a single job of such a group runs, this job is the cause."""
        self._terminate_process()
        lost = [sent.job for sent in self._running.values()]
        if isinstance(error, SetupFailed):
            for job in (*lost, *chain.from_iterable(self._suspects), *self._queued()):
                self._blame(job, "invalid", error)
            self._suspects.clear()
        elif self._on_trial and len(lost) == 1:
            self._blame(lost[0], "exhausted" if lost[0].retry_on_death else "invalid", error)
        else:
            middle = (len(lost) + 1) // 2
            self._suspects.extendleft(half for half in (lost[middle:], lost[:middle]) if half)
        self._running.clear()
        self._on_trial = False

    def _blame(self, job: Job, kind: str, error: Exception) -> None:
        for away in self._away.values():
            if away.probe is job:  # the job's failure does not show whether the endpoint answers
                away.schedule_next_probe()
        _resolve(job, job.same_outcome(kind, error))

    def _hold(self, job: Job, endpoint: str, why: str) -> None:
        now = time.monotonic()
        away = self._away.get(endpoint)
        if away is None:
            away = self._away[endpoint] = _AwayEndpoint(now, why, now + PROBE_S[0], PROBE_S[0])
            self.outages.put(Outage(endpoint, why))
        if away.probe is job:
            away.schedule_next_probe()
            self.outages.put(Outage(endpoint, why, now - away.since, again=True))
        away.why = why
        away.held.append(job)

    def _probe_or_give_up(self) -> None:
        """Queues the probes that are due. If an endpoint has not answered for longer than its `max_wait`, the jobs that
        wait for it fail."""
        now = time.monotonic()
        for endpoint, away in list(self._away.items()):
            if now - away.since > self.setup.endpoints[endpoint].max_wait:
                error = EndpointAway(
                    f"endpoint {endpoint!r} has not answered for {now - away.since:.0f} s, longer than its max_wait: "
                    f"{away.why}",
                    saves=True,
                )
                for job in (*away.held, away.probe):
                    if job:
                        _fail(job, error)
                del self._away[endpoint]
            elif away.probe is None and away.held and now >= away.probe_at:
                away.probe = away.held.pop(0)
                self._jobs.put(away.probe)

    def _on_endpoint_answered(self, endpoint: str) -> None:
        """Handles an endpoint that has answered a request of any job. If the endpoint was away, the outage ends and the
        jobs that wait for it are sent again."""
        if away := self._away.pop(endpoint, None):
            self.outages.put(Outage(endpoint, None, time.monotonic() - away.since))
            for job in away.held:
                self._jobs.put(job)


def _resolve(job: Job, outcomes: list[Outcome]) -> None:
    with suppress(InvalidStateError):  # the job was cancelled or has failed already
        job.outcomes.set_result(outcomes)


def _fail(job: Job, error: BaseException) -> None:
    with suppress(InvalidStateError):  # the job was cancelled or is done already
        job.outcomes.set_exception(error)
