"""One worker process as its parent sees it: start, ask, kill. Knows nothing of queues or of scores."""

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

from rewards.running.worker import Orders
from rl.types import Prompt, Rollout


class Died(Exception):
    """The process ended while it was asked; the message says how."""


class SetupFailed(Exception):
    """The reward could not be loaded in the process, or not in time; the message says why."""


class Process:
    """A fresh interpreter running `main()` of `module`, told its orders.

    Its prints go to this process's stderr. It sits in a process group of its own, so that killing it takes
    along what a reward started.
    """

    def __init__(self, module: str, orders: Orders):
        self.connection, theirs = Pipe()
        fd = theirs.fileno()
        # -P: only the path below counts, not a folder called rewards that happens to be the current one
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
        theirs.close()
        self.send(orders)

    def send(self, message: Any) -> None:
        """Raises Died."""
        try:
            self.connection.send_bytes(pickle.dumps(message))
        except OSError:
            raise Died(self._epitaph()) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """Raises TimeoutError or Died."""
        try:
            if not self.connection.poll(seconds):
                raise TimeoutError(f"took longer than {seconds:g} s")
            return json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise Died(self._epitaph()) from None

    def kill(self) -> None:
        """Ends the process and its children; safe to call while another thread waits for an answer."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it and its group have ended already
            os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """kill(), and gives back what the system holds for it. No other thread may use it any more."""
        self.kill()
        self.process.wait()
        self.connection.close()

    def yield_cores(self) -> None:
        """From now on it computes only when nothing else wants to. There is no way back."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # likewise
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    def loaded(self, setup_s: float) -> float:
        """Seconds that importing and setting up took, from the answer to a job. Raises SetupFailed or Died."""
        try:
            reply = self.receive(setup_s)
        except TimeoutError:
            raise SetupFailed(f"its setup took longer than {setup_s:g} s") from None
        if reply["failed"]:
            raise SetupFailed(reply["failed"])
        return reply["seconds"]

    def _epitaph(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


class WorkerProcess(Process):
    """A process that computes one job at a time (rewards.running.worker)."""

    def __init__(self, orders: Orders):
        super().__init__("rewards.running.worker", orders)

    def load(self, unit: str, setup_s: float) -> float:
        """Seconds that importing and setting up the unit's reward took (about 0 if it was loaded).

        Raises SetupFailed (also when it takes longer than `setup_s` seconds) or Died.
        """
        self.send((unit, []))
        return self.loaded(setup_s)

    def score(
        self,
        unit: str,
        rollouts: Sequence[Rollout | Prompt],
        setup_s: float,
        timeout_s: float,
        patience_s: float,
        impatient: Callable[[float], bool],
    ) -> tuple[list[dict[str, Any]], bool]:
        """Outcomes in order (see rewards.running.worker.outcome) and whether the process asks to be replaced.

        `timeout_s` counts from when the reward is loaded. Every `patience_s` that the answer is not there
        `impatient` is told for how many seconds, until it returns True. Raises SetupFailed, TimeoutError or Died.
        """
        self.send((unit, list(rollouts)))
        self.loaded(setup_s)
        left = timeout_s
        while left > patience_s and not self.connection.poll(patience_s):
            left -= patience_s
            if impatient(timeout_s - left):
                break
        try:
            reply = self.receive(left)
        except TimeoutError:
            raise TimeoutError(f"took longer than {timeout_s:g} s") from None
        return reply["outcomes"], reply["retire"]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(str(Path(p or ".").resolve()) for p in sys.path)
    # A fixed hash seed: sympy walks sets, and the same text must score the same in every worker.
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
