"""The processes of a run: vLLM engines, policy, critic, and the judges that the run serves.

Tested in tests/stages/test_processes.py and tests/runs/test_run.py.
"""

from collections.abc import Callable
from typing import Any

from rl.actors import RemoteObject, Team, free_gpus, gpus, merge_streams, place, place_team
from rl.learner.clients import CriticClient, LearnerClient, PolicyClient
from rl.learner.critic import Critic
from rl.learner.options import LearnerOptions
from rl.learner.policy import Policy
from rl.stop import GO_ON, Stop, WorkerDied
from rollout.pool import EnginePool
from rollout.vllm.client import EngineClient
from rollout.vllm.engine import Engine
from stages.judges import Judges
from stages.plan import Plan, device, judge_gpus, served_here


class Restarts:
    """Counts how many processes were restarted, up to a limit.

    Args:
        limit: the maximum number of restarts.
        say: called with a message for each restart.
    """

    def __init__(self, limit: int, say: Callable[[str], None]) -> None:
        self.limit, self.done, self.say = limit, 0, say

    def count(self, reason: str) -> None:
        """Counts one more restart. Raises Stop if the limit is already reached."""
        if self.done >= self.limit:
            raise Stop(
                f"{reason}: no more restarts, max_restarts is {self.limit}. Find the cause, then {GO_ON}", saves=False
            )
        self.done += 1
        self.say(f"{reason} (restart {self.done} of {self.limit})")


class Samplers:
    """The engines and the judges of a run. The constructor starts all processes in parallel, and `ready` waits for
    them.

    Args:
        restarts: counts each replacement of an engine or of a judge.
        longest: the maximum number of tokens of prompt and response together.
        engines: the number of engines.
    Raises: ValueError if the cluster has too few GPUs.
    """

    def __init__(self, plan: Plan, restarts: Restarts, *, longest: int, engines: int, verbose: bool) -> None:
        self._plan, self._restarts, self._longest, self._count = plan, restarts, longest, engines
        self._verbose, self._device = verbose, device(plan.config)
        self._check_gpus()
        self._gpu_share: dict[str, Any] = {"gpus": 1} if self._device == "cuda" else {}
        self._engines = [self._start_engine() for _ in range(engines)]
        self._judges = Judges(plan.config, plan.rewards, self._device)

    def ready(self) -> None:
        """Starts the processes of the rewards, and waits until all processes are ready.

        Raises: the error of a process that could not start; WorkerDied if a process hangs.
        """
        self._judges.ready()
        rewards = self._plan.rewards.start()
        for engine in self._engines:
            engine.ready(self._plan.config.max_start_s)
        rewards.result()

    def pool(self, replacement: Callable[[int, WorkerDied], EngineClient]) -> EnginePool:
        """Returns one sampler that distributes requests over all engines.

        Args:
            replacement: a function that is called with the number of an engine that died or hung, and with the error.
                The function returns a new engine.
        """
        config = self._plan.config
        return EnginePool(
            [EngineClient(engine) for engine in self._engines],
            merge_streams,
            self._plan.chat,
            max_sequence_length=self._longest,
            temperature=config.rollout.temperature,
            seed=config.seed,
            check_tokens=config.rollout.logprob_check_tokens,
            patience=config.rollout.patience_s,
            replacement=replacement,
        )

    def revive_judge(self, endpoint: str) -> None:
        """Restarts a judge if the judge has died. Does nothing if the run does not serve this judge. Raises Stop after
        too many restarts."""
        self._judges.revive(endpoint, self._restarts.count)

    def close(self) -> None:
        """Ends the judges. If this fails, a message is printed, and no exception is raised: such an exception would
        hide the exception that ended the run."""
        try:
            self._judges.close()
        except RuntimeError as error:
            self._restarts.say(f"a judge's server did not shut down correctly: {error}")

    def replace_engine(self, number: int, died: WorkerDied) -> EngineClient:
        """Replaces an engine that died or hung: kills its process and starts a new engine. Raises Stop after too many
        restarts."""
        self._restarts.count(f"engine {number} is replaced: {died}")
        self._engines[number].end()
        self._engines[number] = self._start_engine()
        self._engines[number].ready(self._plan.config.max_start_s)
        return EngineClient(self._engines[number])

    def _gpus_needed(self) -> dict[str, int]:
        """Returns the number of GPUs that each kind of process needs."""
        judges = sum(judge_gpus(judge) for judge in served_here(self._plan.config, self._plan.rewards).values())
        return {"rollout workers": self._count, "judges": judges}

    def _check_gpus(self) -> None:
        needed = self._gpus_needed()
        if self._device == "cuda" and gpus() < sum(needed.values()):
            listed = ", ".join(f"{count} for {kind}" for kind, count in needed.items() if count)
            raise ValueError(
                f"the cluster has {gpus()} GPUs, but {sum(needed.values())} are needed ({listed}); lower "
                "rollout.workers or learner.ranks, or add GPUs"
            )
        if self._device == "cuda" and (free := free_gpus()) < sum(needed.values()):
            self._restarts.say(
                f"{sum(needed.values())} GPUs are needed, but other programs of the cluster use all except {free} of "
                f"the {gpus()} GPUs; the run waits for them for up to {self._plan.config.max_start_s:g} s (max_start_s)"
            )

    def _start_engine(self) -> RemoteObject[Engine]:
        config = self._plan.config
        return place(
            Engine,
            str(self._plan.model),
            max_sequence_length=self._longest,
            seed=config.seed,
            dtype=config.model.dtype,
            device=self._device,
            threads=config.rollout.threads,
            kv_cache_gib=config.rollout.kv_cache_gib,
            gpu_memory_utilization=config.rollout.gpu_memory_utilization,
            max_images_per_prompt=max(1, self._plan.most_images),
            yarn=config.model.yarn,
            verbose=self._verbose,
            environment={"OMP_NUM_THREADS": str(config.rollout.threads)} if self._device == "cpu" else {},
            **self._gpu_share,
        )


class Processes(Samplers):
    """The processes of a training run: engines, judges, policy and critic."""

    def __init__(self, plan: Plan, restarts: Restarts, *, verbose: bool) -> None:
        config = plan.config
        longest, engines = config.max_sequence_length, config.rollout.workers
        super().__init__(plan, restarts, longest=longest, engines=engines, verbose=verbose)
        threads = {"OMP_NUM_THREADS": str(config.learner.threads)} if config.learner.threads else {}
        arguments = str(plan.model), LearnerOptions.of(config), self._device
        options: dict[str, Any] = {
            "count": config.learner.ranks,
            "environment": threads,
            "patience": config.learner.patience_s,
            "start_s": config.max_start_s,
            **self._gpu_share,
        }
        policy: Team[Policy] = place_team(Policy.of_rank, *arguments, **options)
        critic: Team[Critic] = place_team(Critic.of_rank, *arguments, **options)
        self._teams = {"policy": policy, "critic": critic}
        self.policy, self.critic = PolicyClient(policy), CriticClient(critic)

    @property
    def learners(self) -> dict[str, LearnerClient[Any]]:
        """Policy and critic. The keys are the names of their folders in a checkpoint."""
        return {"policy": self.policy, "critic": self.critic}

    def named(self) -> dict[str, RemoteObject[Any]]:
        """Returns all processes except the judges. The keys are the names of the processes in the timeline."""
        ranks = {f"{name} {i}": rank for name, team in self._teams.items() for i, rank in enumerate(team.ranks)}
        return ranks | self.named_engines()

    def named_engines(self) -> dict[str, RemoteObject[Engine]]:
        """Returns the engines. The keys are the names of the engines in the timeline."""
        return {f"engine {number}": engine for number, engine in enumerate(self._engines)}

    def ready(self) -> None:
        super().ready()
        for team in self._teams.values():
            team.ready(self._plan.config.max_start_s)

    def end(self) -> None:
        """Kills engines, policy and critic."""
        for process in (*self._engines, *self._teams.values()):
            process.end()

    def _gpus_needed(self) -> dict[str, int]:
        ranks = self._plan.config.learner.ranks
        return super()._gpus_needed() | {"the policy": ranks, "the critic": ranks}
