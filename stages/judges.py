"""Serves the judges of a run: the `endpoints` of the recipe that have no url and that a reward uses.

Tested in tests/runs/test_judged_run.py.
"""

from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from rewards.running.runner import RewardRunner
from rl.actors import RemoteObject, is_local_cluster, place
from rl.config import Config
from rl.stop import GO_ON, Stop, WorkerDied
from rollout.vllm.server import KEY_ENV, Server, server_key
from stages.plan import judge_gpus, served_here

PATIENCE_S = 60.0
"""Time limit in seconds for a call to a judge's process that checks whether the server runs, or closes the server."""


class Judges:
    """The vLLM servers of a run's judges, each in its own process. The constructor starts the servers.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, config: Config, rewards: RewardRunner, device: str) -> None:
        self._config, self._rewards, self._device = config, rewards, device
        # The handles are stored, because Ray ends an actor when the actor's last handle is deleted.
        self._processes = {name: self._start(name) for name in served_here(config, rewards)}
        self._serving: list[RemoteObject[Server]] = []  # processes whose server has answered

    def ready(self) -> None:
        """Waits until all servers answer, and then gives the addresses of the servers to the rewards."""
        urls = {}
        for name, judge in self._processes.items():
            urls[name] = self._wait_for_url(judge)
            self._serving.append(judge)
        self._rewards.set_urls(urls, KEY_ENV)

    def revive(self, name: str, count_restart: Callable[[str], None]) -> None:
        """Starts a judge again if its server has died. Does nothing if the run does not serve this judge.

        Args:
            count_restart: a function that gets the reason and is called before the restart. If this function raises an
                exception, the judge is not restarted.
        """
        if self._is_dead(name):
            count_restart(f"judge {name}, which this run serves, has died and is started again")
            self._replace(name)

    def close(self) -> None:
        """Shuts down the servers that have answered, and kills the processes that are still starting. Raises
        RuntimeError if a shutdown failed."""
        serving, processes, self._serving, self._processes = self._serving, self._processes, [], {}
        for judge in processes.values():
            if judge not in serving:
                judge.end()
        for pending in [judge.start(Server.close) for judge in serving]:
            pending.result()

    def _wait_for_url(self, judge: RemoteObject[Server]) -> str:
        """Waits until a server answers, and returns its URL. The server's own time limit is shorter than the limit of
        the call, so that the error has the end of the server's log."""
        limit = self._config.max_start_s
        return judge.start(Server.url, limit).result(limit + PATIENCE_S)

    def _is_dead(self, name: str) -> bool:
        if name not in self._processes:
            return False
        try:
            return not self._processes[name].start(Server.runs).result(PATIENCE_S)
        except WorkerDied:
            return True

    def _replace(self, name: str) -> None:
        """Starts a new server at the old address, because the rewards use this address.

        Raises Stop if this address is not available: the old node is gone, or Ray has placed the new server on another
        node.
        """
        old = self._processes[name]
        self._serving = [judge for judge in self._serving if judge is not old]
        with suppress(WorkerDied):
            old.start(Server.close).result(PATIENCE_S)  # ends child processes of the server that still use memory
        old.end()
        self._processes[name] = self._start(name)
        try:
            self._processes[name].ready(self._config.max_start_s)
            self._wait_for_url(self._processes[name])
        except WorkerDied:
            raise
        except (OSError, RuntimeError) as error:
            address = self._rewards.url(name)
            raise Stop(f"judge {name} cannot be served at {address} again: {error}; {GO_ON}", saves=True) from error
        self._serving.append(self._processes[name])

    def _start(self, name: str) -> RemoteObject[Server]:
        """Starts a server. If the rewards already know an address for this judge, the server gets the same address."""
        judge, known = self._config.endpoints[name], urlsplit(self._rewards.url(name))
        return place(
            Server,
            judge.model,
            host=known.hostname or ("127.0.0.1" if is_local_cluster() else None),
            port=known.port,
            device=self._device,
            options=judge.serve,
            gpus=judge_gpus(judge) if self._device == "cuda" else 0,
            environment={KEY_ENV: server_key()},
        )
