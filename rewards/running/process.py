"""Starts one worker process, sends jobs to it and kills it. This code runs in the parent process.

Tested in tests/rewards/running/test_runner.py.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from rewards.running.worker import WorkerSetup
from rewards.running.writer import Writer
from rl.types import Prompt, Rollout


class ProcessDied(Exception):
    """The process ended while it had a job. The message says how it ended."""


class SetupFailed(Exception):
    """The process could not load the scorer, or loading took too long. The message says why."""


class WorkerProcess:
    """A new Python interpreter that runs `main()` of `module`. The first message to it is `setup`.

    The standard output of the new process goes to the standard error of the parent process. The new process has its own
    process group, so that killing the group also kills the child processes that a reward started.
    """

    def __init__(self, module: str, setup: WorkerSetup):
        self.connection, child_end = Pipe()
        fd = child_end.fileno()
        # With -P, imports use the PYTHONPATH below, and ignore a folder called rewards in the current folder.
        command = [sys.executable, "-P", "-c", f"from {module} import main; main()"]
        command += [str(fd), str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[fd],
            env=_environment(),
            start_new_session=True,
        )
        child_end.close()
        self.send(setup)

    def send(self, message: Any) -> None:
        """Sends a message. Raises ProcessDied if the process has ended."""
        try:
            self.connection.send_bytes(pickle.dumps(message))
        except OSError:
            raise ProcessDied(self.exit_reason()) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """Returns the next message. Raises TimeoutError if no message comes within `seconds`, and ProcessDied if the
        process has ended."""
        try:
            if not self.connection.poll(seconds):
                raise TimeoutError(f"took longer than {seconds:g} s")
            return json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise ProcessDied(self.exit_reason()) from None

    def kill(self) -> None:
        """Kills the process and its child processes. May be called while another thread waits for an answer."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the process and its group have ended already
            os.killpg(self.process.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Kills the process, waits for its end and closes the connection. Afterwards, other threads must not use this
        object."""
        self.kill()
        self.process.wait()
        self.connection.close()

    def lower_priority(self) -> None:
        """Lets the process compute only on idle cores from now on. This cannot be undone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the process has ended already
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    def wait_until_loaded(self, setup_s: float) -> float:
        """Waits until the scorer is loaded. Returns the seconds that this took. Raises SetupFailed or ProcessDied."""
        try:
            reply = self.receive(setup_s)
        except TimeoutError:
            raise SetupFailed(f"its setup took longer than {setup_s:g} s") from None
        if reply["failed"]:
            raise SetupFailed(reply["failed"])
        return reply["seconds"]

    def exit_reason(self) -> str:
        """Says how the process ended: by which signal, or with which exit code."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


class AsyncProcess(WorkerProcess):
    """A process that runs rewards.running.async_worker, many jobs at a time."""

    def __init__(self, setup: WorkerSetup):
        super().__init__("rewards.running.async_worker", setup)
        self._writer = Writer(self.connection)

    def send_job(self, job: bytes) -> None:
        """Sends a pickled job. If the process has ended, the next `receive` raises ProcessDied."""
        self._writer.put(job)

    def terminate(self) -> None:
        self.kill()
        self._writer.close()
        super().terminate()


class ComputeProcess(WorkerProcess):
    """A process that runs rewards.running.worker, one job at a time."""

    def __init__(self, setup: WorkerSetup):
        super().__init__("rewards.running.worker", setup)

    def load(self, scorer: str, setup_s: float) -> float:
        """Loads a scorer. Returns the seconds that loading took (about 0 if it was loaded before).

        Raises SetupFailed (also if loading takes longer than `setup_s` seconds) or ProcessDied.
        """
        self.send((scorer, []))
        return self.wait_until_loaded(setup_s)

    def score(
        self,
        scorer: str,
        items: Sequence[Rollout | Prompt],
        setup_s: float,
        timeout_s: float,
        patience_s: float,
        on_slow: Callable[[float], bool],
    ) -> tuple[list[dict[str, Any]], bool]:
        """Returns the outcomes in the order of `items` (see rewards.running.worker.to_outcome). Also returns True if
        the process must be replaced, else False.

        The time limit `timeout_s` starts when the scorer is loaded. While there is no answer, `on_slow` is called every
        `patience_s` seconds, with the seconds passed so far. Once `on_slow` has returned True, it is not called again.
        Raises SetupFailed, TimeoutError or ProcessDied.
        """
        self.send((scorer, list(items)))
        self.wait_until_loaded(setup_s)
        remaining = timeout_s
        while remaining > patience_s and not self.connection.poll(patience_s):
            remaining -= patience_s
            if on_slow(timeout_s - remaining):
                break
        try:
            reply = self.receive(remaining)
        except TimeoutError:
            raise TimeoutError(f"took longer than {timeout_s:g} s") from None
        return reply["outcomes"], reply["retire"]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(str(Path(p or ".").resolve()) for p in sys.path)
    # The hash seed is fixed because sympy iterates over sets, and a text must get the same score in every process.
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
