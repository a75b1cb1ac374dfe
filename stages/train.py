"""A run from start to end: places the parts, repeats the iteration, writes its traces, survives interruption."""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.runner import Outage
from rl import checkpoint
from rl.actors import Team, Worker, alone, as_they_come, cluster, gather, gpus, place, place_team
from rl.checkpoint import Checkpoints
from rl.critic import Critic
from rl.display import Display
from rl.features import FeatureStore
from rl.interrupt import Interrupted, Interrupts
from rl.learner import Policy
from rl.run_folder import RunFolder
from rl.stop import Stop
from rl.timeline import Timeline
from rl.tracking import Trackers
from rollout.engine import Engine
from rollout.judge_server import JudgeServer
from rollout.partial import PartialRollouts
from rollout.pool import Pool
from rollout.rows import PromptOrder
from stages.loop import Clock, Parts, catch_up, evaluate, ppo_iteration, sync
from stages.plan import Plan, device, evaluates, judge_gpus, saves, served_here

POLL_S = 0.2  # between questions whether a checkpoint is written
BEGUN = "begun.json"  # in a checkpoint's state: responses under way, where the recipe has partial rollouts


def train(plan: Plan, folder: RunFolder, display: Display, *, recipe: Mapping[str, Any], verbose: bool = False) -> bool:
    """Run the plan to its end, continuing from the newest checkpoint in `folder` if there is one.

    Returns: False if the run was interrupted; it has saved and can be resumed.
    """
    interrupts = Interrupts()
    with interrupts.installed(), plan.rewards, cluster(verbose=verbose):
        checkpoints = Checkpoints(
            folder.checkpoints,
            keep=plan.config.checkpoint.keep,
            keep_every=plan.config.checkpoint.keep_every,
            expected=plan.checkpoint_bytes,
        )
        start = checkpoints.newest(display.message)
        done = checkpoint.counters(start)["iteration"] if start else -1
        folder.truncate_after(done)
        trackers = Trackers(plan.config.log.trackers, folder.path, recipe=recipe, first_step=done + 1)
        run = _Run(plan, folder, checkpoints, display, trackers, interrupts)
        try:
            with interrupts.waiting():
                run.begin(start, verbose=verbose)
            run.loop(max(done, 0))
            return True
        except Interrupted:
            run.stop_early("interrupted")
            return False
        except Stop as stop:
            if stop.saves:
                run.stop_early("stopped")
            raise
        finally:
            run.close()
            trackers.close()


class _Run:
    """The parts of a run and where it stands."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        checkpoints: Checkpoints,
        display: Display,
        trackers: Trackers,
        interrupts: Interrupts,
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.folder, self.display, self.trackers, self.interrupts = folder, display, trackers, interrupts
        self.order = PromptOrder(plan.train, self.config.seed)
        self.done: int | None = None  # iterations whose effects are in the learner, once it is ready
        self.saved: int | None = None  # the newest of them that a checkpoint holds
        self.checkpoints = checkpoints
        self.judges: list[Worker] = []  # servers that this run has started
        self._parts: Parts | None = None  # once they are placed
        self.partial: PartialRollouts | None = None  # if the recipe asks for it
        self.timeline: Timeline | None = None  # likewise
        self.engine_names: list[str] = []  # in the timeline
        self.outages: queue.SimpleQueue[Outage] = queue.SimpleQueue()
        plan.rewards.on_outage = self._hear

    def begin(self, start: Path | None, *, verbose: bool) -> None:
        """Place engines, policy and critic side by side, and bring them to where the run stands."""
        config, where, cores = self.config, device(self.config), os.cpu_count() or 1
        engines, self.policy, self.critic = self._place(where, verbose)
        self._serve_judges(where)
        ready = self.plan.rewards.warm()
        for worker in (self.policy, self.critic, *engines):
            worker.ready()
        ready.result()
        if start:
            self._restore(start)
        done = checkpoint.counters(start)["iteration"] if start else 0
        pool = Pool(
            engines,
            as_they_come,
            self.plan.chat,
            max_sequence_length=config.max_sequence_length,
            temperature=config.rollout.temperature,
            seed=config.seed,
        )
        if partial := config.rollout.partial:
            self.partial = PartialRollouts(pool, wanted=config.prompts_per_iteration, chunk=partial.chunk_tokens)
            if start:
                self.partial.resume(done, json.loads((start / "state" / BEGUN).read_text()), self.plan.train)
        if config.log.timeline:
            self._draw(engines)
        self._parts = Parts(
            config,
            self.partial or pool,
            self.plan.rewards,
            self.policy,
            self.critic,
            FeatureStore(self.policy.workers, config.learner.features_mib),
            phase=self.display.phase,
            interruptible=self.interrupts.waiting,
            meanwhile=self._ride_out,
            side_by_side=where == "cuda" or 2 * config.learner.ranks * (config.learner.threads or cores) <= cores,
        )
        sync(done, self._prompts(done + 1), self.parts)
        # The engines' own start-up is not counted. What the check has shown the learner are the coming pictures.
        self.parts.told = replace(self.parts.encodings, learner=0)
        self.done = self.saved = done if start else None
        self.display.message(f"ready: {self.folder.path}" + (f", resuming after iteration {done}" if start else ""))

    @property
    def teams(self) -> dict[str, Team]:
        """Those that hold a model, by the name of its folder in a checkpoint."""
        return {"policy": self.policy, "critic": self.critic}

    def _draw(self, engines: Sequence[Worker]) -> None:
        """From now on, keep a timeline of what every process does."""
        named = {f"{name} {i}": worker for name, team in self.teams.items() for i, worker in enumerate(team.workers)}
        self.engine_names = [f"engine {i}" for i in range(len(engines))]
        named |= zip(self.engine_names, engines, strict=True)
        self.timeline = Timeline(self.folder.timeline, named)

    @property
    def parts(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("the parts of the run are not placed yet")
        return self._parts

    def _place(self, where: str, verbose: bool) -> tuple[list[Worker], Team, Team]:
        config, plan = self.config, self.plan
        judges = sum(judge_gpus(judge) for judge in served_here(config, plan.rewards).values())
        ranks = config.learner.ranks
        if where == "cuda" and gpus() < (needed := config.rollout.workers + 2 * ranks + judges):
            raise ValueError(
                f"the cluster has {gpus()} GPUs, but {config.rollout.workers} rollout workers, {ranks} for the policy, "
                f"{ranks} for the critic and {judges} for judges need {needed}; lower rollout.workers or "
                "learner.ranks, or add GPUs"
            )
        share: dict[str, Any] = {"gpus": 1} if where == "cuda" else {}
        threads = {"OMP_NUM_THREADS": str(config.learner.threads)} if config.learner.threads else {}
        engines = [
            place(
                Engine,
                str(plan.model),
                max_sequence_length=config.max_sequence_length,
                seed=config.seed,
                dtype=config.model.dtype,
                device=where,
                threads=config.rollout.threads,
                kv_cache_gib=config.rollout.kv_cache_gib,
                gpu_memory_utilization=config.rollout.gpu_memory_utilization,
                max_images_per_prompt=max(1, plan.most_images),
                verbose=verbose,
                environment={"OMP_NUM_THREADS": str(config.rollout.threads)} if where == "cpu" else {},
                **share,
            )
            for _ in range(config.rollout.workers)
        ]
        policy, critic = (
            place_team(made.of_rank, str(plan.model), config, where, count=ranks, environment=threads, **share)
            for made in (Policy, Critic)
        )
        return engines, policy, critic

    def _serve_judges(self, where: str) -> None:
        """Start the judges that have no server yet; rewards learn where they are."""
        asked = served_here(self.config, self.plan.rewards).items()
        servers = {
            name: place(
                JudgeServer,
                judge.model,
                host="127.0.0.1" if alone() else None,
                device=where,
                options=judge.serve,
                gpus=judge_gpus(judge) if where == "cuda" else 0,
            )
            for name, judge in asked
        }
        self.plan.rewards.served({name: server.call("url") for name, server in servers.items()})
        self.judges = list(servers.values())  # kept, because an actor ends with its last handle

    def close(self) -> None:
        """End what runs beside the main thread, and the judges in good order; those still starting end with their
        actor."""
        if self._parts is not None:
            self._parts.ahead.abandon()
        try:
            gather([judge.start("close") for judge in self.judges])
        except RuntimeError as error:  # must not hide why the run ends
            self.display.message(f"a judge's server did not end in good order: {error}")

    def _hear(self, outage: Outage) -> None:
        """Told in whatever thread waits for rewards; only the main one knows when it may save."""
        self.outages.put(outage)
        if threading.current_thread() is threading.main_thread():
            self._ride_out()

    def _ride_out(self) -> None:
        """An endpoint stays away, or is back: what has been learned is saved, and the run waits."""
        while not self.outages.empty():
            self._tell_of(self.outages.get())

    def _tell_of(self, outage: Outage) -> None:
        if outage.why is None:
            self.display.message(f"endpoint {outage.endpoint} is back after {outage.seconds:.0f} s")
            return
        if self.done is not None and self.saved != self.done:
            self._save()
        wait = self.config.endpoints[outage.endpoint].max_wait
        self.display.message(
            f"endpoint {outage.endpoint} does not answer ({outage.why}); waiting for up to {wait:.0f} s"
            + (f", everything up to iteration {self.saved} is saved" if self.saved is not None else "")
        )

    def _restore(self, start: Path) -> None:
        counters = checkpoint.counters(start)
        gather(
            [
                team.start("restore", start / name, start / "state" / name, counters[f"{name}_steps"])
                for name, team in self.teams.items()
            ]
        )

    def _prompts(self, iteration: int) -> list:
        asked = self.config.prompt_range(iteration)
        return self.order.prompts_at(asked.start, len(asked))

    def loop(self, done: int) -> None:
        """All iterations that are left, then the final policy and the table of what was learned."""
        if self.done is None:
            self._record({"iteration": 0, "stage": self.config.stage, **self._evaluation()})
            self.done = 0
        for iteration in range(done + 1, self.config.iterations + 1):
            self._iterate(iteration)
            if saves(self.config, iteration):
                self._save()
            self.interrupts.check()
        self._finish()

    def _iterate(self, iteration: int) -> None:
        clock = Clock(self.display.phase, self.timeline.add if self.timeline else None)
        prompts = self._prompts(iteration)
        following = self._prompts(iteration + 1) if iteration < self.config.iterations else []
        metrics, scored = ppo_iteration(iteration, prompts, following, self.parts, clock)
        if evaluates(self.config, iteration) and self.plan.held_out:
            with clock("sync"):
                metrics |= catch_up(iteration, prompts, self.parts)
            metrics |= self._evaluation()
        metrics |= self.parts.new_encodings()
        metrics |= self._checkpoint_metrics()
        self.folder.write_rollouts(iteration, scored, self.config.rollout.save)
        self._record({"iteration": iteration, "stage": self.config.stage, **metrics, **clock.metrics()})
        self.done = iteration
        if self.timeline:
            self.timeline.write(busy=self.engine_names if self.parts.ahead.has(iteration + 1) else ())

    def _evaluation(self) -> dict[str, float]:
        if not self.plan.held_out:
            return {}
        self.display.phase("evaluation")
        return evaluate(self.plan.held_out, self.parts)

    def _record(self, metrics: dict[str, Any]) -> None:
        self.folder.write_metrics(metrics)
        self.trackers.log(metrics["iteration"], metrics)
        if metrics["iteration"]:
            self.display.iteration(metrics)
        self.display.evaluation(metrics)

    def _save(self) -> None:
        assert self.done is not None
        self.display.phase("checkpoint")
        self.checkpoints.begin(self.done, self._begin_save)
        self.saved = self.done

    def _begin_save(self, target: Path) -> tuple[Mapping[str, Any], Callable[[], None]]:
        """The learners copy what they have, and write it while the run goes on."""
        pending = {
            name: team.start("save", target / name, target / "state" / name) for name, team in self.teams.items()
        }
        steps = {f"{name}_steps": one.result() for name, one in pending.items()}
        if self.partial:
            (target / "state").mkdir(exist_ok=True)
            (target / "state" / BEGUN).write_text(json.dumps(self.partial.left(self.done or 0)))
        workers = [worker for team in self.teams.values() for worker in team.workers]

        def finish() -> None:
            while not all(gather([worker.start("written") for worker in workers])):
                time.sleep(POLL_S)

        return {"seed": self.config.seed, **steps}, finish

    def _checkpoint_metrics(self) -> dict[str, float]:
        """Of the one that was finished in this iteration, if one was."""
        self.checkpoints.check()
        metrics: dict[str, float] = {}
        for written in self.checkpoints.told():
            metrics = {
                "checkpoint/seconds": written.seconds,
                "checkpoint/blocked_seconds": written.blocked,
                "checkpoint/mib": written.bytes / 2**20,
            }
        return metrics

    def stop_early(self, how: str) -> None:
        """Keep what has been learned."""
        if self.done is None:
            self.display.message(f"{how} before the first iteration; nothing to save")
            return
        if self.saved != self.done:
            self._save()
        self.checkpoints.settle()
        self.display.message(
            f"{how} after iteration {self.done}; go on with: python -m rl.run --resume {self.folder.path}"
        )

    def _finish(self) -> None:
        self.display.phase("checkpoint")
        self.checkpoints.settle()
        newest = checkpoint.finished(self.folder.checkpoints)[-1]
        checkpoint.publish(newest / "policy", self.folder.policy)
        evaluations = [m for m in self.folder.read_metrics() if any(k.startswith("eval/") for k in m)]
        if evaluations:
            self.display.summary(evaluations[0], evaluations[-1])
        self.display.message(f"policy: {self.folder.policy}")
