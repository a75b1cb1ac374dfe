"""The child process that runs async rewards: one event loop scores many samples at once.

Only async_pool.py starts this process. Tested in tests/rewards/running/test_async_pool.py.
"""

import asyncio
import os
import pickle
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from rewards.endpoint import SampleClock, Unreachable, clock
from rewards.registry import BoundReward
from rewards.running.worker import (
    RewardWorker,
    address_space,
    connect_to_parent,
    describe_error,
    limit_memory,
    send,
    to_outcomes,
)
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
            outcome = {"away": e.endpoint, "why": e.why}
        except TimeoutError as e:  # raised by the time limit, or by the reward itself
            late = sample_clock.elapsed >= timeout_s
            outcome = {"exhausted": f"took longer than {timeout_s:g} s"} if late else {"invalid": describe_error(e)}
        except (MemoryError, RecursionError):
            os._exit(3)  # the parent runs the jobs again, one at a time, to find the job that took the memory
        except (Exception, SystemExit, asyncio.CancelledError) as e:
            outcome = {"invalid": describe_error(e)}
        return [outcome] * len(items)


async def serve(connection: Connection) -> None:
    """Answers jobs until the parent closes the connection.

    A job is (number, scorer, items, time limit in seconds). A job without items only loads the scorer.
    """
    worker = AsyncRewardWorker(pickle.loads(connection.recv_bytes()))
    closed = asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    async def answer(number: int, scorer: str, items: Sequence[Rollout | Prompt], timeout_s: float) -> None:
        send(connection, {"number": number, "outcomes": await worker.answer(scorer, items, timeout_s)})

    def read() -> None:
        try:
            while connection.poll(0):
                number, scorer, items, timeout_s = pickle.loads(connection.recv_bytes())
                if items:
                    task = asyncio.get_running_loop().create_task(answer(number, scorer, items, timeout_s))
                    running.add(task)  # the event loop keeps only weak references to its tasks
                    task.add_done_callback(running.discard)
                else:
                    limit_memory(None)  # removes the limit that was set after the previous scorer was loaded
                    start, failed = time.monotonic(), worker.load(scorer)
                    send(connection, {"failed": failed, "seconds": time.monotonic() - start})
                    limit_memory(address_space() + (max(s.memory_mb for s in worker.scorers.values()) << 20))
        except (EOFError, ConnectionError):
            closed.set()

    asyncio.get_running_loop().add_reader(connection.fileno(), read)
    while not closed.is_set():
        send(connection, {"pulse": True})
        try:
            await asyncio.wait_for(closed.wait(), PULSE_S)
        except TimeoutError:
            continue


def main() -> None:
    asyncio.run(serve(connect_to_parent()))
