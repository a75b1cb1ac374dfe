"""Runs the project's commands as a user would. Finds and ends processes that these commands leave behind."""

import atexit
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.support.patience import Deadline

ROOT = Path(__file__).resolve().parents[2]
MARK = "STEP3_VL_RL_TEST_RUN"
NOTHING: Mapping[str, str] = MappingProxyType({})
PATIENCE = 240  # seconds that a small run may take on a machine without other work
SMALL_RUN = (
    "rl.run",
    ROOT / "recipes/rlvr.yaml",
    "--profile",
    "cpu",
    "iterations=4",
    "prompts_per_iteration=8",
    "rollouts_per_prompt=4",
    "data.eval_limit=4",
    "checkpoint.every=2",
    "eval.every=2",
)
"""The arguments of an rlvr run with the CPU profile: 4 iterations of 8 prompts x 4 rollouts."""


class Command:
    """Starts `python -m ...` in `folder`.

    An environment variable marks the command and every process that it starts, directly or indirectly. After each test,
    tests/conftest.py calls `end_all`, which kills all marked processes.
    """

    def __init__(self, *arguments: object, folder: Path = ROOT, environment: Mapping[str, str] = NOTHING) -> None:
        self.mark = uuid.uuid4().hex
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VLLM_", "OMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=folder,
            env=clean | dict(environment) | {MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _started.append(self)

    def finish(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Waits until the command ends. Returns exit code, standard output and standard error."""
        deadline = Deadline(timeout)
        while True:
            try:
                out, err = self.process.communicate(timeout=min(timeout, 1.0))
            except subprocess.TimeoutExpired:
                if deadline.passed():
                    self.end()
                    raise
            else:
                return self.process.returncode, out, err

    def interrupt(self) -> None:
        """Sends SIGINT to every process of the process group, as a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Kills only the command's main process, with SIGKILL. This simulates a crash."""
        self.process.kill()
        self.process.communicate()

    def end(self, patience: float = 30) -> None:
        """Kills every process that carries the mark."""
        deadline = Deadline(patience)
        while (found := self.marked()) and not deadline.passed():  # marked processes may start new processes
            for pid, _ in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait(patience)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    def left_behind(self, patience: float = 20) -> list[str]:
        """Returns the command lines of the marked processes that still run after `patience` seconds."""
        deadline = Deadline(patience)
        while (found := [line for _, line in self.marked()]) and not deadline.passed():
            time.sleep(0.2)
        return found

    def marked(self) -> list[tuple[int, str]]:
        """Returns (process id, command line) of every running process that carries the mark."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if wanted in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append((int(entry.name), line))
            except OSError:  # the process has ended, or belongs to another user
                continue
        return [(pid, line) for pid, line in found if line]


_started: list[Command] = []


@atexit.register
def end_all() -> None:
    """Ends all commands that were started since the last call."""
    while _started:
        _started.pop().end()


def run(
    *arguments: object, folder: Path = ROOT, timeout: float = PATIENCE, environment: Mapping[str, str] = NOTHING
) -> tuple[int, str, str]:
    """Runs a command to its end, asserts that it leaves no process behind, and returns the result of `finish`."""
    command = Command(*arguments, folder=folder, environment=environment)
    result = command.finish(timeout)
    assert command.left_behind() == []
    return result


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits until the condition is true. Fails after PATIENCE seconds."""
    deadline = Deadline(PATIENCE)
    while not condition():
        assert not deadline.passed()
        time.sleep(0.05)


def wait_for(condition: Callable[[], bool], command: Command) -> None:
    """Waits until the condition is true. Fails if the command ends earlier."""

    def fulfilled() -> bool:
        if condition():
            return True
        assert command.process.poll() is None, command.finish()
        return False

    wait_until(fulfilled)


def wait_for_iteration(folder: Path, iteration: int, command: Command) -> None:
    """Waits until metrics.jsonl has this iteration. Fails if the command ends earlier."""
    wait_for(lambda: any(line["iteration"] >= iteration for line in metrics(folder)), command)


def named(command: Command, kind: str) -> list[int]:
    """Returns the process ids of the command's Ray actors whose class name starts with `kind`."""
    return [pid for pid, line in command.marked() if line.startswith(f"ray::{kind}")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of metrics.jsonl. Skips the last line if it is still being written."""
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def samples(folder: Path, iteration: int) -> list[dict[str, Any]]:
    """Returns the saved samples of an iteration."""
    with gzip.open(folder / f"rollouts/{iteration:06d}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the metrics that must be equal in two runs: all except times, throughput and `checkpoint/*`."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "checkpoint/", "rollout/tokens_per_second"))}
        for line in lines
    ]
