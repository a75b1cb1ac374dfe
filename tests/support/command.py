"""Runs the project's commands as a user would, and finds processes that they leave behind."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "STEP3_VL_RL_TEST_RUN"
NOTHING: Mapping[str, str] = MappingProxyType({})
PATIENCE = 240  # seconds that a small run may take on a busy machine
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
"""A run of rlvr on the CPU profile: 4 iterations of 8 prompts x 4 rollouts."""


class Command:
    """`python -m ...`, started in `folder`; every process it starts, however indirectly, carries a mark."""

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

    def finish(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, out, err

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of this process alone, as a crash would be."""
        self.process.kill()
        self.process.communicate()

    def left_behind(self, patience: float = 20) -> list[str]:
        """Command lines of processes with our mark that are still there after `patience` seconds."""
        deadline = time.monotonic() + patience
        while (found := [line for _, line in self.marked()]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def marked(self) -> list[tuple[int, str]]:
        """(process id, command line) of everything that it has started and that runs."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if wanted in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append((int(entry.name), line))
            except OSError:  # gone, or not ours
                continue
        return [(pid, line) for pid, line in found if line]


def run(
    *arguments: object, folder: Path = ROOT, timeout: float = PATIENCE, environment: Mapping[str, str] = NOTHING
) -> tuple[int, str, str]:
    """A command from start to end, after which nothing of it may be left."""
    command = Command(*arguments, folder=folder, environment=environment)
    result = command.finish(timeout)
    assert command.left_behind() == []
    return result


def wait_until(condition: Callable[[], bool]) -> None:
    """Until it is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for(condition: Callable[[], bool], command: Command) -> None:
    """Until it is true, while the command runs."""

    def fulfilled() -> bool:
        if condition():
            return True
        assert command.process.poll() is None, command.finish()
        return False

    wait_until(fulfilled)


def wait_for_iteration(folder: Path, iteration: int, command: Command) -> None:
    """Until metrics.jsonl has that iteration."""
    wait_for(lambda: any(line["iteration"] >= iteration for line in metrics(folder)), command)


def named(command: Command, kind: str) -> list[int]:
    """Ids of the command's worker processes of a class."""
    return [pid for pid, line in command.marked() if line.startswith(f"ray::{kind}")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def samples(folder: Path, iteration: int) -> list[dict[str, Any]]:
    """An iteration's rollouts as they were saved."""
    with gzip.open(folder / f"rollouts/{iteration:06d}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be the same in two runs: everything but times, throughput and checkpoints being written."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "checkpoint/", "rollout/tokens_per_second"))}
        for line in lines
    ]
