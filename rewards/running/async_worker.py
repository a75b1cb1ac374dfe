"""The child process that runs async rewards: one event loop scores many samples at once.

Only async_pool.py starts this process. Tested in tests/rewards/running/test_async_pool.py.
"""

import asyncio
import json
import os
import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from rewards.endpoint import SampleClock, Unreachable, clock, take_answered
from rewards.registry import BoundReward
from rewards.running.worker import (
    RewardWorker,
    address_space,
    connect_to_parent,
    describe_error,
    limit_memory,
    to_outcomes,
)
from rewards.running.writer import Writer
from rl.types import Prompt, Rollout

PULSE_S = 1.0  # seconds between pulse messages; if no pulse comes, a reward is blocking the event loop


class AsyncRewardWorker(RewardWorker):
    """Scores many jobs at a time. All jobs share one memory limit, the largest `memory_mb` of the scorers."""

    async def answer(self, scorer: str, items: Sequence[Rollout | Prompt], timeout_s: float) -> list[dict[str, Any]]:
        """Returns one outcome per item."""
        start = time.monotonic()
        outcomes = await self._outcomes(self.loaded[scorer], items, timeout_s)
        return [{**outcome, "seconds": (time.monotonic() - start) / len(outcomes)} for outcome in outcomes]

    async def _outcomes(
        self, bound: BoundReward, items: Sequence[Rollout | Prompt], timeout_s: float
    ) -> list[dict[str, Any]]:
        sample_clock = SampleClock()
        clock.set(sample_clock)
        try:
            result = await sample_clock.limit(timeout_s, bound(list(items) if bound.reward.group else items[0]))
            return to_outcomes(bound, result, len(items))
        except Unreachable as e:
            outcome = {"away": e.endpoint, "why": e.why, "status": e.status, "answers_others": e.answers_others}
        except TimeoutError as e:  # raised by the time limit, or by the reward itself
            late = sample_clock.elapsed >= timeout_s
            outcome = {"exhausted": f"took longer than {timeout_s:g} s"} if late else {"invalid": describe_error(e)}
        except (MemoryError, RecursionError) as e:
            _give_up(e)
        except (Exception, SystemExit, asyncio.CancelledError) as e:
            outcome = {"invalid": describe_error(e)}
        return [outcome] * len(items)


def _give_up(error: BaseException) -> NoReturn:
    """Ends this process after an error that does not belong to one job. The parent runs the jobs again in smaller
    groups, to find the job that is the cause."""
    with suppress(MemoryError):
        print(f"the process of the async rewards ends: {error!r}", file=sys.stderr, flush=True)
    os._exit(3)


async def serve(connection: Connection) -> None:
    """Answers jobs until the parent closes the connection.

    A job is (number, scorer, items, time limit in seconds). A job without items only loads the scorer.
    """
    worker = AsyncRewardWorker(pickle.loads(connection.recv_bytes()))
    writer = Writer(connection)
    closed = asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    def send(message: dict[str, Any]) -> None:
        writer.put(json.dumps(message).encode())

    async def answer(number: int, scorer: str, items: Sequence[Rollout | Prompt], timeout_s: float) -> None:
        outcomes = await worker.answer(scorer, items, timeout_s)
        send({"number": number, "outcomes": outcomes, "answered": take_answered()})

    def on_done(task: asyncio.Task[None]) -> None:
        running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _give_up(error)

    def read() -> None:
        try:
            while connection.poll(0):
                number, scorer, items, timeout_s = pickle.loads(connection.recv_bytes())
                if items:
                    task = asyncio.get_running_loop().create_task(answer(number, scorer, items, timeout_s))
                    running.add(task)  # the event loop keeps only weak references to its tasks
                    task.add_done_callback(on_done)
                else:
                    limit_memory(None)  # removes the limit that was set after the previous scorer was loaded
                    start, failed = time.monotonic(), worker.load(scorer)
                    send({"failed": failed, "seconds": time.monotonic() - start})
                    limit_memory(address_space() + (max(s.memory_mb for s in worker.scorers.values()) << 20))
        except (EOFError, ConnectionError):
            closed.set()
        except BaseException as error:  # asyncio would only log the error, and the job would never be answered
            _give_up(error)

    asyncio.get_running_loop().add_reader(connection.fileno(), read)
    while not closed.is_set():
        send({"pulse": True, "answered": take_answered()})
        try:
            await asyncio.wait_for(closed.wait(), PULSE_S)
        except TimeoutError:
            continue


def main() -> None:
    asyncio.run(serve(connect_to_parent()))
