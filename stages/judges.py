"""The judges that a run serves itself: those of `endpoints` that have no url and that a reward asks.

Tested in tests/runs/test_judged_run.py.
"""

from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from rewards.running.runner import RewardRunner
from rl.actors import RemoteObject, is_local_cluster, place
from rl.config import Config
from rl.stop import GO_ON, Stop, WorkerDied
from rollout.vllm.server import Server
from stages.plan import judge_gpus, served_here

PATIENCE_S = 60.0
"""Seconds within which the process of a judge has to answer whether its server runs."""


class Judges:
    """vLLM servers of the run's judges, each in a process of its own. They start at once; `ready` waits for them.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, config: Config, rewards: RewardRunner, device: str) -> None:
        self._config, self._rewards, self._device = config, rewards, device
        # Kept, because Ray ends an actor with its last handle.
        self._processes = {name: self._start(name) for name in served_here(config, rewards)}
        self._serving: list[RemoteObject[Server]] = []  # those of them that have answered

    def ready(self) -> None:
        """Waits until all servers answer and gives the rewards their addresses."""
        urls = {}
        for name, judge in self._processes.items():
            urls[name] = judge.start(Server.url).result()
            self._serving.append(judge)
        self._rewards.set_urls(urls)

    def revive(self, name: str, count_restart: Callable[[str], None]) -> None:
        """Serves a judge again if the run serves it and it has died.

        Args:
            count_restart: called with the reason before the restart; may raise to refuse it.
        """
        if self._is_dead(name):
            count_restart(f"judge {name}, which this run serves, has died and is started again")
            self._replace(name)

    def close(self) -> None:
        """Ends the judges: an orderly shutdown of those that serve, a kill of those that are still starting. Raises
        RuntimeError if a shutdown failed."""
        serving, processes, self._serving, self._processes = self._serving, self._processes, [], {}
        for judge in processes.values():
            if judge not in serving:
                judge.end()
        for pending in [judge.start(Server.close) for judge in serving]:
            pending.result()

    def _is_dead(self, name: str) -> bool:
        if name not in self._processes:
            return False
        try:
            return not self._processes[name].start(Server.runs).result(PATIENCE_S)
        except WorkerDied:
            return True

    def _replace(self, name: str) -> None:
        """Starts a new server at the address that the rewards know. They notice by themselves when it answers.

        Raises Stop if the address is not available, because its node is gone or Ray placed the new server on another.
        """
        old = self._processes[name]
        self._serving = [judge for judge in self._serving if judge is not old]
        with suppress(WorkerDied):
            old.start(Server.close).result(PATIENCE_S)  # processes that the server left behind hold memory
        old.end()
        self._processes[name] = self._start(name)
        try:
            self._processes[name].ready(self._config.max_start_s)
        except OSError as error:
            address = self._rewards.url(name)
            raise Stop(f"judge {name} cannot be served at {address} again: {error}; {GO_ON}", saves=True) from error
        self._serving.append(self._processes[name])

    def _start(self, name: str) -> RemoteObject[Server]:
        """Starts a server, at the address that the rewards know if they know one."""
        judge, known = self._config.endpoints[name], urlsplit(self._rewards.url(name))
        return place(
            Server,
            judge.model,
            host=known.hostname or ("127.0.0.1" if is_local_cluster() else None),
            port=known.port,
            device=self._device,
            options=judge.serve,
            gpus=judge_gpus(judge) if self._device == "cuda" else 0,
        )
