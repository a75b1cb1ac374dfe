"""The process that runs async rewards: one event loop, many samples at once. Only async_pool.py starts it."""

import asyncio
import os
import pickle
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from rewards.endpoint import SampleClock, Unreachable, clock
from rewards.registry import BoundReward
from rewards.running.worker import Worker, address_space, connected, last_line, limit_memory, outcomes_of, say
from rl.types import Prompt, Rollout

PULSE_S = 1.0  # seconds between signs of life; their absence means that a reward blocks the loop


class AsyncWorker(Worker):
    """Scores many jobs at a time. All of them share the room of the unit that has most."""

    async def answer(self, unit: str, rollouts: Sequence[Rollout | Prompt], timeout_s: float) -> list[dict[str, Any]]:
        """One outcome per rollout."""
        began = time.monotonic()
        found = await self._outcomes(self.loaded[unit], rollouts, timeout_s)
        return [{**outcome, "seconds": (time.monotonic() - began) / len(found)} for outcome in found]

    async def _outcomes(
        self, bound: BoundReward, rollouts: Sequence[Rollout | Prompt], timeout_s: float
    ) -> list[dict[str, Any]]:
        counting = SampleClock()
        clock.set(counting)
        try:
            result = await counting.limit(timeout_s, bound(list(rollouts) if bound.reward.group else rollouts[0]))
            return outcomes_of(bound, result, len(rollouts))
        except Unreachable as e:
            found = {"away": e.endpoint, "why": e.why}
        except TimeoutError as e:  # ours, or one that the reward raised
            late = counting.elapsed >= timeout_s
            found = {"exhausted": f"took longer than {timeout_s:g} s"} if late else {"invalid": last_line(e)}
        except (MemoryError, RecursionError):
            os._exit(3)  # whose memory it was is found out by asking again, one at a time
        except (Exception, SystemExit, asyncio.CancelledError) as e:
            found = {"invalid": last_line(e)}
        return [found] * len(rollouts)


async def serve(connection: Connection) -> None:
    """Answers jobs until the other end closes. A job is (number, unit, rollouts, seconds); no rollouts: only load."""
    worker = AsyncWorker(pickle.loads(connection.recv_bytes()))
    closed = asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    async def answer(number: int, unit: str, rollouts: Sequence[Rollout | Prompt], timeout_s: float) -> None:
        say(connection, {"number": number, "outcomes": await worker.answer(unit, rollouts, timeout_s)})

    def read() -> None:
        try:
            while connection.poll(0):
                number, unit, rollouts, timeout_s = pickle.loads(connection.recv_bytes())
                if rollouts:
                    task = asyncio.get_running_loop().create_task(answer(number, unit, rollouts, timeout_s))
                    running.add(task)  # the loop itself keeps no hold on its tasks
                    task.add_done_callback(running.discard)
                else:
                    limit_memory(None)  # that of the units loaded before
                    start, failed = time.monotonic(), worker.load(unit)
                    say(connection, {"failed": failed, "seconds": time.monotonic() - start})
                    limit_memory(address_space() + (max(u.memory_mb for u in worker.units.values()) << 20))
        except (EOFError, ConnectionError):
            closed.set()

    asyncio.get_running_loop().add_reader(connection.fileno(), read)
    while not closed.is_set():
        say(connection, {"pulse": True})
        try:
            await asyncio.wait_for(closed.wait(), PULSE_S)
        except TimeoutError:
            continue


def main() -> None:
    asyncio.run(serve(connected()))
