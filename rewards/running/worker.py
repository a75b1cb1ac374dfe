"""The child process for rewards that compute. It loads rewards, scores one job at a time, and answers over a pipe.

Only rewards.running.process starts this process. Tested in tests/rewards/running/test_runner.py.
"""

import ctypes
import json
import math
import os
import pickle
import resource
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

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ScorerSetup:
    """Describes how to load a reward, penalty or row judge. `memory_mb` is the memory in MiB that scoring may use in
    addition to the memory in use after loading."""

    use: str
    params: Mapping[str, Any]
    memory_mb: int


@dataclass(frozen=True)
class WorkerSetup:
    """The first message that a worker process receives."""

    scorers: Mapping[str, ScorerSetup]
    base_dir: Path  # `file.py:Name` is relative to this folder
    endpoints: Mapping[str, EndpointSpec]


class RewardWorker:
    """Loads each scorer (reward, penalty or row judge) when the scorer is first needed. Scores one job at a time."""

    def __init__(self, setup: WorkerSetup):
        self.scorers, self.base_dir = setup.scorers, setup.base_dir
        configure(setup.endpoints)
        self.loaded: dict[str, BoundReward] = {}
        self.baseline = 0  # bytes of address space while nothing is scored

    def load(self, scorer: str) -> str | None:
        """Loads a scorer. Returns an error message if loading failed, or None if the scorer is ready."""
        if scorer in self.loaded:
            return None
        try:
            setup = self.scorers[scorer]
            bound = get(setup.use, setup.params, self.base_dir)
            _ = bound.scorer  # imports and setup() run here, outside the sample's time limit
        except (Exception, SystemExit) as e:
            return f"its setup failed: {describe_error(e)}"
        self.loaded[scorer] = bound
        self.baseline = address_space()
        return None

    def score(self, scorer: str, items: Sequence[Rollout | Prompt]) -> tuple[list[dict[str, Any]], bool]:
        """Returns one outcome per item, and True if this process should be replaced now."""
        bound, room = self.loaded[scorer], self.scorers[scorer].memory_mb << 20
        limit_memory(self.baseline + room)
        try:
            result = bound(list(items) if bound.reward.group else items[0])
            outcomes = to_outcomes(bound, result, len(items))
        except (MemoryError, RecursionError) as e:
            return [{"exhausted": describe_error(e)}] * len(items), True
        except (Exception, SystemExit) as e:
            outcomes = [{"invalid": describe_error(e)}] * len(items)
        finally:
            limit_memory(None)
        # A library may keep memory after a call. If it keeps more than half of `memory_mb`, the process is replaced.
        return outcomes, address_space() - self.baseline > room // 2


def to_outcomes(bound: BoundReward, result: Any, count: int) -> list[dict[str, Any]]:
    """Converts a scorer's return value for `count` items into one outcome for each item."""
    if not bound.reward.group:
        return [to_outcome(bound, result)]
    if not isinstance(result, Sequence) or len(result) != count:
        returned = f"{len(result)} scores" if isinstance(result, Sequence) else repr(result)
        return [{"invalid": f"returned {returned} for a group of {count} rollouts"}] * count
    return [to_outcome(bound, one) for one in result]


def to_outcome(bound: BoundReward, result: Any) -> dict[str, Any]:
    """Checks a scorer's return value. Returns {"value": number, "details": mapping}, or {"invalid": reason}."""
    score = result if isinstance(result, Score) else Score(result)
    try:
        value = float(score.value)
    except (TypeError, ValueError):
        return {"invalid": f"returned {score.value!r}, which is no number"}
    if not math.isfinite(value):
        return {"invalid": f"returned {value}"}
    if bound.reward.kind != "reward" and not 0 <= value <= 1:
        zero = "0 (no offence)" if bound.reward.kind == "penalty" else "0"
        return {"invalid": f"returned {value}; the value of a {bound.reward.kind} must be between {zero} and 1"}
    if value < bound.reward.lowest:
        return {
            "invalid": f"returned {value}, but its lowest value is {bound.reward.lowest} (truncated responses get this "
            f"value); declare the lowest value that the reward can return: @reward({bound.reward.name!r}, lowest=...)"
        }
    try:
        details = json.loads(json.dumps(dict(score.details)))
    except (TypeError, ValueError) as e:
        return {"invalid": f"its details can't be written as JSON: {e}"}
    return {"value": value, "details": details}


def describe_error(error: BaseException) -> str:
    """Describes an exception and the place where it was raised: "KeyError: 'x' (my_reward.py:12)". For Invalid, returns
    only the message."""
    if isinstance(error, Invalid):
        return str(error) or "the reward raised Invalid"
    text = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text[:500]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text[:500]


def address_space() -> int:
    """Returns the size of this process's address space in bytes. Returns 0 on systems without /proc, because memory is
    not limited there."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def limit_memory(size: int | None) -> None:
    """Limits this process's address space to `size` bytes; None removes the limit."""
    if not Path("/proc/self/statm").exists():
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if size is None else size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def die_with_parent(parent: int) -> None:
    """Asks the Linux kernel to kill this process when the thread that started it ends. Call this in the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before this call
            os._exit(1)


def serve(connection: Connection) -> None:
    """Answers jobs until the connection closes. A job is (scorer, items). A job without items only loads the scorer."""
    worker = RewardWorker(pickle.loads(connection.recv_bytes()))
    while True:
        try:
            scorer, items = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        start = time.monotonic()
        failed = worker.load(scorer)
        send(connection, {"failed": failed, "seconds": time.monotonic() - start})
        if items and not failed:
            outcomes, retire = worker.score(scorer, items)
            send(connection, {"outcomes": outcomes, "retire": retire})


def send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def connect_to_parent() -> Connection:
    """Connects to the parent. The command line contains the connection's file descriptor and the parent's process
    id."""
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    return Connection(int(sys.argv[1]))


def main() -> None:
    serve(connect_to_parent())
