"""The processes of a run: vLLM engines, policy, critic, and the judges that it serves itself."""

from typing import Any

from rl.actors import Team, Worker, alone, gather, gpus, place, place_team
from rl.critic import Critic
from rl.learner import Policy
from rollout.engine import Engine
from rollout.judge_server import JudgeServer
from stages.plan import Plan, device, judge_gpus, served_here


class Processes:
    """All of them, placed side by side; `ready` waits for them.

    Raises: ValueError if the cluster has too few GPUs.
    """

    def __init__(self, plan: Plan, *, verbose: bool) -> None:
        config = plan.config
        self._plan, self._verbose, self._where = plan, verbose, device(config)
        self._check_gpus()
        self._share: dict[str, Any] = {"gpus": 1} if self._where == "cuda" else {}
        threads = {"OMP_NUM_THREADS": str(config.learner.threads)} if config.learner.threads else {}
        given = str(plan.model), config, self._where
        self.engines = [self._engine() for _ in range(config.rollout.workers)]
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
        self.judges = self._serve_judges()  # kept, because an actor ends with its last handle

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
        rewards = self._plan.rewards.warm()
        for worker in (self.policy, self.critic, *self.engines):
            worker.ready(self._plan.config.max_start_s)
        rewards.result()

    def replace_engine(self, number: int) -> Worker:
        """End an engine, and start another."""
        self.engines[number].end()
        self.engines[number] = self._engine()
        self.engines[number].ready(self._plan.config.max_start_s)
        return self.engines[number]

    def close(self) -> None:
        """End the judges in good order; those still starting end with their actor. Raises RuntimeError if one did
        not."""
        judges, self.judges = self.judges, []
        gather([judge.start("close") for judge in judges])

    def end(self) -> None:
        """Stop everything at once, whatever it is doing."""
        for worker in (*self.engines, self.policy, self.critic):
            worker.end()

    def _check_gpus(self) -> None:
        config = self._plan.config
        ranks, workers = config.learner.ranks, config.rollout.workers
        judges = sum(judge_gpus(judge) for judge in served_here(config, self._plan.rewards).values())
        if self._where == "cuda" and gpus() < (needed := workers + 2 * ranks + judges):
            raise ValueError(
                f"the cluster has {gpus()} GPUs, but {workers} rollout workers, {ranks} for the policy, {ranks} for "
                f"the critic and {judges} for judges need {needed}; lower rollout.workers or learner.ranks, or add GPUs"
            )

    def _engine(self) -> Worker:
        config = self._plan.config
        return place(
            Engine,
            str(self._plan.model),
            max_sequence_length=config.max_sequence_length,
            seed=config.seed,
            dtype=config.model.dtype,
            device=self._where,
            threads=config.rollout.threads,
            kv_cache_gib=config.rollout.kv_cache_gib,
            gpu_memory_utilization=config.rollout.gpu_memory_utilization,
            max_images_per_prompt=max(1, self._plan.most_images),
            verbose=self._verbose,
            environment={"OMP_NUM_THREADS": str(config.rollout.threads)} if self._where == "cpu" else {},
            **self._share,
        )

    def _serve_judges(self) -> list[Worker]:
        """Start the judges that have no server yet; rewards learn where they are."""
        servers = {
            name: place(
                JudgeServer,
                judge.model,
                host="127.0.0.1" if alone() else None,
                device=self._where,
                options=judge.serve,
                gpus=judge_gpus(judge) if self._where == "cuda" else 0,
            )
            for name, judge in served_here(self._plan.config, self._plan.rewards).items()
        }
        self._plan.rewards.served({name: server.call("url") for name, server in servers.items()})
        return list(servers.values())
