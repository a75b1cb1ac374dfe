"""One process for rewards that wait, such as those that ask a judge: many jobs at a time, outages ridden out.

A job that blocks or kills the process is found by asking everything that was under way once more, one at a time. A
job whose endpoint stays away is held; the endpoint is probed with one job until it answers or has been waited for
too long.
"""

import atexit
import itertools
import os
import queue
import random
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from rewards.running.pool import Job, Outcome, Pool
from rewards.running.process import Died, Process, SetupFailed
from rewards.running.worker import Orders
from rl.stop import Stop

MOST_AT_ONCE = 1024  # jobs given to the process; an endpoint's own limit is its `concurrency`
STALL_S = (2.0, 30.0)  # silence after which the process counts as blocked: least and most
PROBE_S = (2.0, 60.0)  # between probes of an endpoint that is away: first and most


class EndpointAway(Stop):
    """An endpoint stayed away for longer than the run may wait."""


@dataclass(frozen=True)
class Outage:
    """News of an endpoint: it does not answer (and why), still does not after a while (`again`), or is back after
    `seconds` (`why` is None)."""

    endpoint: str
    why: str | None
    seconds: float = 0.0
    again: bool = False


@dataclass
class _Away:
    """An endpoint that does not answer, and what waits for it."""

    since: float
    why: str
    probe_at: float
    pause_s: float
    held: list[Job] = field(default_factory=list)
    probe: Job | None = None

    def probe_again(self) -> None:
        """The probe under way has ended without an answer; the next one comes after a longer pause."""
        self.probe = None
        self.pause_s = min(PROBE_S[1], 2 * self.pause_s)
        self.probe_at = time.monotonic() + self.pause_s * random.uniform(0.8, 1.2)


class AsyncPool(Pool):
    """Jobs of async units in, outcomes out. An outage longer than the endpoint's `max_wait` fails what waits for it
    with EndpointAway.

    news  outages as they begin and end, for whoever wants to hear
    """

    def __init__(self, orders: Orders, setup_s: float):
        super().__init__(orders, setup_s)
        self.news: queue.SimpleQueue[Outage] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._wake, self._waker = os.pipe()
        self._numbers = itertools.count()
        self._running: dict[int, Job] = {}
        self._suspects: list[Job] = []  # were under way when the process ended; asked again, each alone
        self._alone: Job | None = None
        self._away: dict[str, _Away] = {}
        self._heard = 0.0  # when the process last said something
        self._process: Process | None = None
        self._thread: threading.Thread | None = None

    def _start(self, ready: Future[float]) -> None:
        self._thread = threading.Thread(target=self._run, args=(ready,), name="async rewards", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        self.warm()
        self._jobs.put(job)
        os.write(self._waker, b".")

    def close(self) -> None:
        """Ends the process; unfinished jobs are cancelled."""
        with self._lock:
            self.closed = True
            if self._waker < 0:
                return
        atexit.unregister(self.close)
        os.write(self._waker, b".")
        if self._thread:
            self._thread.join()
        for job in self._unfinished():
            job.outcomes.cancel()
        os.close(self._wake)
        os.close(self._waker)
        self._wake = self._waker = -1

    def _unfinished(self) -> list[Job]:
        held = [job for away in self._away.values() for job in (*away.held, away.probe) if job]
        return [*self._running.values(), *self._suspects, *held, *self._waiting()]

    def _run(self, ready: Future[float]) -> None:
        start = time.monotonic()
        try:
            self._begin()
        except (SetupFailed, Died) as e:
            ready.set_exception(RuntimeError(str(e)))
        else:
            ready.set_result(time.monotonic() - start)
        try:
            while not self.closed:
                try:
                    self._turn()
                except (SetupFailed, Died) as e:
                    self._lost(e)
        except BaseException as e:  # whoever waits for a job must hear of it, whatever it is
            self.closed = True
            for job in self._unfinished():
                _fail(job, e)
            raise
        finally:
            self._end()

    def _begin(self) -> None:
        """A process with every unit loaded. Raises SetupFailed or Died, with no process left."""
        self._process = Process("rewards.running.async_worker", self.orders)
        try:
            for unit in self.orders.units:
                self._process.send((0, unit, [], 0.0))
                self._loaded(unit)
        except (SetupFailed, Died):
            self._end()
            raise
        self._heard = time.monotonic()

    def _loaded(self, unit: str) -> None:
        deadline = time.monotonic() + self.setup_s
        while not self.closed:
            assert self._process
            try:
                reply = self._process.receive(min(0.2, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise SetupFailed(f"reward {unit}: its setup took longer than {self.setup_s:g} s") from None
                continue
            if "failed" in reply:
                if reply["failed"]:
                    raise SetupFailed(f"reward {unit}: {reply['failed']}")
                return

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.bury()

    def _turn(self) -> None:
        """Hand out what may run, then wait for an answer, a job or the time of a probe."""
        self._release()
        if self._process is None:
            if self._jobs.empty() and not self._suspects:
                self._sleep([])
                return
            self._begin()
        assert self._process
        self._hand_out()
        ready = self._sleep([self._process.connection])
        if self._process.connection in ready:
            self._heard = time.monotonic()
            reply = self._process.receive(0)
            if "number" in reply:
                self._answered(self._running.pop(reply["number"]), reply["outcomes"])
        elif time.monotonic() - self._heard > self._stall_s():
            raise Died(f"it blocked the event loop for {time.monotonic() - self._heard:.0f} s")

    def _sleep(self, connections: list[Any]) -> list[Any]:
        """Until one of these has something, a job comes, or half a second has passed; those that have something."""
        ready = wait([*connections, self._wake], timeout=0.5)
        if self._wake in ready:
            os.read(self._wake, 4096)
        return ready

    def _stall_s(self) -> float:
        least, most = STALL_S
        return min([most, *(max(least, job.timeout_s) for job in self._running.values())])

    def _hand_out(self) -> None:
        if self._alone is None and not self._suspects:
            for job in self._waiting(MOST_AT_ONCE - len(self._running)):
                self._send(job)
        elif self._alone is None and not self._running:
            self._alone = self._suspects.pop(0)
            self._send(self._alone)

    def _waiting(self, most: float = float("inf")) -> list[Job]:
        found: list[Job] = []
        while len(found) < most and not self._jobs.empty():
            found.append(self._jobs.get())
        return found

    def _send(self, job: Job) -> None:
        if job.outcomes.cancelled():
            return
        assert self._process
        number = next(self._numbers)
        self._running[number] = job
        self._process.send((number, job.unit, list(job.rollouts), job.timeout_s))

    def _answered(self, job: Job, outcomes: list[Outcome]) -> None:
        if job is self._alone:
            self._alone = None
        if absent := next((outcome for outcome in outcomes if "away" in outcome), None):
            self._hold(job, absent["away"], absent["why"])
            return
        for endpoint in [name for name, away in self._away.items() if away.probe is job]:
            self._back(endpoint)
        _resolve(job, outcomes)

    def _lost(self, error: Exception) -> None:
        """The process has ended, or can't be started; what it had is asked again, what it had alone is to blame."""
        self._end()
        if isinstance(error, SetupFailed):
            for job in (*self._running.values(), *self._suspects, *self._waiting()):
                self._blame(job, "invalid", error)
            self._suspects.clear()
        elif self._alone is not None:
            self._blame(self._alone, "exhausted" if self._alone.again else "invalid", error)
        else:
            self._suspects += self._running.values()
        self._running.clear()
        self._alone = None

    def _blame(self, job: Job, kind: str, error: Exception) -> None:
        for away in self._away.values():
            if away.probe is job:  # it said nothing about the endpoint
                away.probe_again()
        _resolve(job, job.all(kind, error))

    def _hold(self, job: Job, endpoint: str, why: str) -> None:
        now = time.monotonic()
        away = self._away.get(endpoint)
        if away is None:
            away = self._away[endpoint] = _Away(now, why, now + PROBE_S[0], PROBE_S[0])
            self.news.put(Outage(endpoint, why))
        if away.probe is job:
            away.probe_again()
            self.news.put(Outage(endpoint, why, now - away.since, again=True))
        away.why = why
        away.held.append(job)

    def _release(self) -> None:
        """Probe endpoints whose time has come; give up on those that were waited for too long."""
        now = time.monotonic()
        for endpoint, away in list(self._away.items()):
            if now - away.since > self.orders.endpoints[endpoint].max_wait:
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

    def _back(self, endpoint: str) -> None:
        away = self._away.pop(endpoint)
        self.news.put(Outage(endpoint, None, time.monotonic() - away.since))
        for job in away.held:
            self._jobs.put(job)


def _resolve(job: Job, outcomes: list[Outcome]) -> None:
    with suppress(InvalidStateError):  # cancelled, or given up on, in the meantime
        job.outcomes.set_result(outcomes)


def _fail(job: Job, error: BaseException) -> None:
    with suppress(InvalidStateError):  # likewise
        job.outcomes.set_exception(error)
