"""The processes of a run: vLLM engines, policy, critic, and the judges that it serves itself."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from rl.actors import Team, Worker, alone, gather, gpus, place, place_team
from rl.learner.critic import Critic
from rl.learner.policy import Policy
from rl.stop import GO_ON, Stop, WorkerDied
from rollout.vllm.engine import Engine
from rollout.vllm.server import Server
from stages.plan import Plan, device, judge_gpus, served_here

JUDGE_PATIENCE_S = 60.0
"""Seconds within which a judge's process has to say whether its server runs."""


class Restarts:
    """How often processes may still be replaced.

    Args:
        say: told of each.
    """

    def __init__(self, limit: int, say: Callable[[str], None]) -> None:
        self.limit, self.done, self._say = limit, 0, say

    def count(self, what: str) -> None:
        """Raises Stop beyond the limit."""
        if self.done >= self.limit:
            raise Stop(f"{what}: no more, max_restarts is {self.limit}. Look at why, then {GO_ON}", saves=False)
        self.done += 1
        self._say(f"{what} (restart {self.done} of {self.limit})")


class Samplers:
    """Engines, and the judges that the run serves itself, placed side by side; `ready` waits for them.

    Args:
        longest: tokens of prompt and response together, at most.
        engines: how many.
    Raises: ValueError if the cluster has too few GPUs.
    """

    def __init__(self, plan: Plan, *, longest: int, engines: int, verbose: bool) -> None:
        self._plan, self._longest, self._count = plan, longest, engines
        self._verbose, self._where = verbose, device(plan.config)
        self._check_gpus()
        self._share: dict[str, Any] = {"gpus": 1} if self._where == "cuda" else {}
        self.engines = [self._engine() for _ in range(engines)]
        self.judges = self._start_judges()  # kept, because an actor ends with its last handle
        self._serving: list[Worker] = []  # those of them that answer

    def ready(self) -> None:
        """Waits until all are there, the rewards' own processes too.

        Raises: what a constructor raised; WorkerDied if one hangs.
        """
        urls = {}
        for name, judge in self.judges.items():
            urls[name] = judge.call("url")
            self._serving.append(judge)
        self._plan.rewards.set_urls(urls)
        rewards = self._plan.rewards.start()
        for engine in self.engines:
            engine.ready(self._plan.config.max_start_s)
        rewards.result()

    def replace_engine(self, number: int) -> Worker:
        """End an engine, and start another."""
        self.engines[number].end()
        self.engines[number] = self._engine()
        self.engines[number].ready(self._plan.config.max_start_s)
        return self.engines[number]

    def revive_judge(self, name: str, restarts: Restarts) -> None:
        """Serve a judge again if this run serves it and it has died."""
        if self._lost_judge(name):
            restarts.count(f"judge {name}, which this run serves, has died and is started again")
            self._replace_judge(name)

    def _lost_judge(self, name: str) -> bool:
        if name not in self.judges:
            return False
        try:
            return not self.judges[name].start("runs").result(JUDGE_PATIENCE_S)
        except WorkerDied:
            return True

    def _replace_judge(self, name: str) -> None:
        """At the address that the rewards know; they find out by themselves when it answers.

        Raises Stop if that address is gone, as it is with its node, or if Ray places it on another.
        """
        old = self.judges[name]
        self._serving = [judge for judge in self._serving if judge is not old]
        with suppress(WorkerDied):
            old.start("close").result(JUDGE_PATIENCE_S)  # what the server has left behind holds memory
        old.end()
        self.judges[name] = self._judge(name)
        try:
            self.judges[name].ready(self._plan.config.max_start_s)
        except OSError as error:
            where = self._plan.rewards.url(name)
            raise Stop(f"judge {name} cannot be served at {where} again: {error}; {GO_ON}", saves=True) from error
        self._serving.append(self.judges[name])

    def close(self) -> None:
        """End the judges: in good order those that answer, at once those that are still starting. Raises RuntimeError
        if one did not."""
        serving, judges, self._serving, self.judges = self._serving, self.judges, [], {}
        for judge in judges.values():
            if judge not in serving:
                judge.end()
        gather([judge.start("close") for judge in serving])

    def _needed(self) -> dict[str, int]:
        """Who needs how many GPUs."""
        judges = sum(judge_gpus(judge) for judge in served_here(self._plan.config, self._plan.rewards).values())
        return {"rollout workers": self._count, "judges": judges}

    def _check_gpus(self) -> None:
        needed = self._needed()
        if self._where == "cuda" and gpus() < sum(needed.values()):
            listed = ", ".join(f"{count} for {who}" for who, count in needed.items() if count)
            raise ValueError(
                f"the cluster has {gpus()} GPUs, but {sum(needed.values())} are needed ({listed}); lower "
                "rollout.workers or learner.ranks, or add GPUs"
            )

    def _engine(self) -> Worker:
        config = self._plan.config
        return place(
            Engine,
            str(self._plan.model),
            max_sequence_length=self._longest,
            seed=config.seed,
            dtype=config.model.dtype,
            device=self._where,
            threads=config.rollout.threads,
            kv_cache_gib=config.rollout.kv_cache_gib,
            gpu_memory_utilization=config.rollout.gpu_memory_utilization,
            max_images_per_prompt=max(1, self._plan.most_images),
            yarn=config.model.yarn,
            verbose=self._verbose,
            environment={"OMP_NUM_THREADS": str(config.rollout.threads)} if self._where == "cpu" else {},
            **self._share,
        )

    def _start_judges(self) -> dict[str, Worker]:
        """Those that have no server yet."""
        return {name: self._judge(name) for name in served_here(self._plan.config, self._plan.rewards)}

    def _judge(self, name: str) -> Worker:
        """At the address that the rewards' processes know, if they have been told one."""
        judge, known = self._plan.config.endpoints[name], urlsplit(self._plan.rewards.url(name))
        host = known.hostname or ("127.0.0.1" if alone() else None)
        return place(
            Server,
            judge.model,
            host=host,
            port=known.port,
            device=self._where,
            options=judge.serve,
            gpus=judge_gpus(judge) if self._where == "cuda" else 0,
        )


class Processes(Samplers):
    """Those of a training run: policy and critic as well."""

    def __init__(self, plan: Plan, *, verbose: bool) -> None:
        config = plan.config
        super().__init__(plan, longest=config.max_sequence_length, engines=config.rollout.workers, verbose=verbose)
        threads = {"OMP_NUM_THREADS": str(config.learner.threads)} if config.learner.threads else {}
        given = str(plan.model), config, self._where
        self.policy, self.critic = (
            place_team(
                made.of_rank,
                *given,
                count=config.learner.ranks,
                environment=threads,
                patience=config.learner.patience_s,
                **self._share,
            )
            for made in (Policy, Critic)
        )

    @property
    def teams(self) -> dict[str, Team]:
        """Those that hold a model, by the name of its folder in a checkpoint."""
        return {"policy": self.policy, "critic": self.critic}

    def named(self) -> dict[str, Worker]:
        """All but the judges, as the timeline calls them."""
        learners = {f"{name} {i}": worker for name, team in self.teams.items() for i, worker in enumerate(team.workers)}
        return learners | self.named_engines()

    def named_engines(self) -> dict[str, Worker]:
        """The engines, as the timeline calls them."""
        return {f"engine {number}": worker for number, worker in enumerate(self.engines)}

    def ready(self) -> None:
        """Waits until all are there, the rewards' own processes too.

        Raises: what a constructor raised; WorkerDied if one hangs.
        """
        super().ready()
        for team in (self.policy, self.critic):
            team.ready(self._plan.config.max_start_s)

    def end(self) -> None:
        """Stop everything at once, whatever it is doing."""
        for worker in (*self.engines, self.policy, self.critic):
            worker.end()

    def _needed(self) -> dict[str, int]:
        ranks = self._plan.config.learner.ranks
        return super()._needed() | {"the policy": ranks, "the critic": ranks}
