"""The process that rewards run in, as seen from inside. Started by rewards.running.process only."""

import ctypes
import json
import math
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rewards.endpoint import EndpointSpec, configure
from rewards.registry import BoundReward, Invalid, Score, get
from rl.types import Prompt, Rollout

try:
    import resource
except ImportError:  # Windows: time limits only
    resource = None


PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Unit:
    """A reward with its parameters; scoring may take `memory_mb` on top of what loading took."""

    use: str
    params: Mapping[str, Any]
    memory_mb: int


@dataclass(frozen=True)
class Orders:
    """What a worker process is told when it starts."""

    units: Mapping[str, Unit]
    base_dir: Path  # that `file.py:Name` is relative to
    endpoints: Mapping[str, EndpointSpec]


class Worker:
    """Loads rewards as they are asked for and scores with them, one job at a time."""

    def __init__(self, orders: Orders):
        self.units, self.base_dir = orders.units, orders.base_dir
        configure(orders.endpoints)
        self.loaded: dict[str, BoundReward] = {}
        self.baseline = 0  # bytes of address space when nothing is being scored

    def load(self, unit: str) -> str | None:
        """Why the unit could not be loaded; None if it is ready."""
        if unit in self.loaded:
            return None
        try:
            spec = self.units[unit]
            bound = get(spec.use, spec.params, self.base_dir)
            _ = bound.scorer  # imports and setup() happen here, outside the sample's time limit
        except (Exception, SystemExit) as e:
            return f"its setup failed: {last_line(e)}"
        self.loaded[unit] = bound
        self.baseline = address_space()
        return None

    def score(self, unit: str, rollouts: Sequence[Rollout | Prompt]) -> tuple[list[dict[str, Any]], bool]:
        """One outcome per rollout, and whether this process should be replaced now."""
        bound, room = self.loaded[unit], self.units[unit].memory_mb << 20
        limit_memory(self.baseline + room)
        try:
            result = bound(list(rollouts) if bound.reward.group else rollouts[0])
            outcomes = outcomes_of(bound, result, len(rollouts))
        except (MemoryError, RecursionError) as e:
            return [{"exhausted": last_line(e)}] * len(rollouts), True
        except (Exception, SystemExit) as e:
            outcomes = [{"invalid": last_line(e)}] * len(rollouts)
        finally:
            limit_memory(None)
        # What a library keeps from call to call must not eat the room of the samples to come.
        return outcomes, address_space() - self.baseline > room // 2


def outcomes_of(bound: BoundReward, result: Any, count: int) -> list[dict[str, Any]]:
    """One outcome for each of `count` rollouts, from what the reward returned for all of them."""
    if not bound.reward.group:
        return [outcome(bound, result)]
    if not isinstance(result, Sequence) or len(result) != count:
        got = f"{len(result)} scores" if isinstance(result, Sequence) else repr(result)
        return [{"invalid": f"returned {got} for a group of {count} rollouts"}] * count
    return [outcome(bound, one) for one in result]


def outcome(bound: BoundReward, result: Any) -> dict[str, Any]:
    """A reward's return value as the runner hears it: {"value", "details"} or {"invalid"}."""
    score = result if isinstance(result, Score) else Score(result)
    try:
        value = float(score.value)
    except (TypeError, ValueError):
        return {"invalid": f"returned {score.value!r}, which is no number"}
    if not math.isfinite(value):
        return {"invalid": f"returned {value}"}
    if bound.reward.kind != "reward" and not 0 <= value <= 1:
        zero = "0 (no offence)" if bound.reward.kind == "penalty" else "0"
        return {"invalid": f"returned {value}; a {bound.reward.kind} is between {zero} and 1"}
    if value < bound.reward.lowest:
        return {
            "invalid": f"returned {value}, but its lowest value, which truncated responses get, is "
            f"{bound.reward.lowest}; declare it: @reward({bound.reward.name!r}, lowest=...)"
        }
    try:
        details = json.loads(json.dumps(dict(score.details)))
    except (TypeError, ValueError) as e:
        return {"invalid": f"its details can't be written as JSON: {e}"}
    return {"value": value, "details": details}


def last_line(error: BaseException) -> str:
    """What was raised and where: "KeyError: 'x' (my_reward.py:12)"; just the sentence for Invalid."""
    if isinstance(error, Invalid):
        return str(error) or "the reward raised Invalid"
    said = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said[:500]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else said[:500]


def address_space() -> int:
    """Bytes this process has mapped; 0 where the system does not say (then memory is not limited)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def limit_memory(size: int | None) -> None:
    if resource is None or not Path("/proc/self/statm").exists():
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if size is None else size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def die_with(parent: int) -> None:
    """To be called in the child: on Linux the kernel kills it when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(1)


def serve(connection: Connection) -> None:
    """Answers jobs until the other end closes. A job is (unit, rollouts); no rollouts means: only load."""
    worker = Worker(pickle.loads(connection.recv_bytes()))
    while True:
        try:
            unit, rollouts = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        start = time.monotonic()
        failed = worker.load(unit)
        say(connection, {"failed": failed, "seconds": time.monotonic() - start})
        if rollouts and not failed:
            outcomes, retire = worker.score(unit, rollouts)
            say(connection, {"outcomes": outcomes, "retire": retire})


def say(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def connected() -> Connection:
    """The connection to the parent, which gave two arguments: its file descriptor and its own process id."""
    die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    return Connection(int(sys.argv[1]))


def main() -> None:
    serve(connected())
