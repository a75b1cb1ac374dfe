"""Runs a training from start to end: starts the processes, runs the iterations and writes the results.

Tested in tests/runs/test_run.py.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.running.runner import Outage
from rl.actors import cluster
from rl.interrupt import Interrupts
from rl.learner.features import FeatureStore
from rl.record import checkpoints
from rl.record.checkpoints import Checkpoints
from rl.record.display import Display
from rl.record.run_folder import RunFolder
from rl.record.timeline import Timeline
from rl.record.tracking import Trackers
from rl.stop import Stop, WorkerDied
from rl.types import Prompt, Scored
from rollout.data.pictures import PictureWatch
from rollout.partial import PartialRollouts
from rollout.pool import EnginePool
from rollout.vllm.client import EngineClient
from stages.base import Stage, StageTools
from stages.loop import (
    Clock,
    Diverged,
    LoopState,
    Services,
    catch_up,
    check_rows,
    evaluate,
    ppo_iteration,
    require_valid,
    sync,
)
from stages.plan import Plan, device, evaluates, saves, skipped_lines
from stages.processes import Processes, Restarts

POLL_S = 0.2  # seconds between two checks of whether a checkpoint is written completely
UNFINISHED = "begun.json"  # file in a checkpoint's state/; contains the unfinished responses of partial rollouts


def train(
    plan: Plan,
    folder: RunFolder,
    display: Display,
    *,
    recipe: Mapping[str, Any],
    verbose: bool = False,
    interrupts: Interrupts | None = None,
) -> bool:
    """Runs the plan to its end. Continues from the newest intact checkpoint in `folder` if there is one.

    If policy or critic dies, all processes are restarted from the newest checkpoint, at most `max_restarts` times.

    Args:
        recipe: all values of the recipe, for the trackers.
        interrupts: records the request to stop the run (optional). If the request comes just before the end of the
            run, the run ends normally, but the caller can see the request in this object.
    Returns: False if the run was interrupted. An interrupted run has saved a checkpoint and can be resumed.
    """
    interrupts, restarts = interrupts or Interrupts(), Restarts(plan.config.max_restarts, display.message)
    if plan.skipped:
        display.message("\n".join(skipped_lines(plan.skipped)))
    with interrupts.installed(), plan.rewards, cluster(verbose=verbose):
        while True:
            run = _Run(plan, folder, display, interrupts, restarts, recipe, verbose=verbose)
            try:
                run.run()
                return True
            except KeyboardInterrupt:  # Interrupted; Ray can raise a KeyboardInterrupt in its place
                run.stop_early("interrupted")
                return False
            except Stop as stop:
                if stop.saves:
                    run.stop_early("stopped")
                raise
            except WorkerDied as died:
                run.abandon()
                restarts.count(f"{died}. Starting again from the newest checkpoint")
            finally:
                run.close()


class _Run:
    """One attempt to complete a run, with the processes and the progress of this attempt."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        display: Display,
        interrupts: Interrupts,
        restarts: Restarts,
        recipe: Mapping[str, Any],
        *,
        verbose: bool,
    ) -> None:
        self.plan, self.config, self.folder, self.display = plan, plan.config, folder, display
        self.interrupts, self.restarts, self.verbose = interrupts, restarts, verbose
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            keep=self.config.checkpoint.keep,
            keep_every=self.config.checkpoint.keep_every,
            expected=plan.checkpoint_bytes,
        )
        self.start = self.checkpoints.newest(display.message)
        self.resumed_after = checkpoints.counters(self.start)["iteration"] if self.start else -1  # -1: a new run
        folder.truncate_after(self.resumed_after)
        if folder.write_rewards(max(self.resumed_after, 0) + 1, plan.rewards.versions()):
            display.message(
                f"the code or the parameters of rewards have changed since the last start; see {folder.rewards}"
            )
        first_step = self.resumed_after + 1
        self.trackers = Trackers(self.config.log.trackers, folder.path, recipe=recipe, first_step=first_step)
        self.done: int | None = None  # number of finished iterations; None until the run is ready
        self.saved: int | None = None  # newest iteration that has a checkpoint
        self.state = LoopState()
        self._processes: Processes | None = None  # None until the processes are started
        self._services: Services | None = None  # None until all processes are ready
        self._pool: EnginePool | None = None
        self._abandoned = False
        self.partial: PartialRollouts | None = None  # set if the recipe asks for partial rollouts
        self.timeline: Timeline | None = None  # set if the recipe asks for a timeline
        self.outages: queue.SimpleQueue[Outage] = queue.SimpleQueue()
        plan.rewards.on_outage = self._on_outage

    def run(self) -> None:
        """Starts the processes and runs all iterations."""
        with self.interrupts.waiting():
            self.begin()
        self.loop(max(self.resumed_after, 0))

    def begin(self) -> None:
        """Starts all processes in parallel and restores the newest checkpoint."""
        config, cores, done = self.config, os.cpu_count() or 1, max(self.resumed_after, 0)
        self._processes = processes = Processes(self._plan_to_start(), self.restarts, verbose=self.verbose)
        processes.ready()
        if self.start:
            self._restore(self.start)
        self._pool = processes.pool(self._replace_engine)
        if partial := config.rollout.partial:
            self.partial = PartialRollouts(self._pool, wanted=config.prompts_per_iteration, chunk=partial.chunk_tokens)
            if self.start:
                unfinished = json.loads((self.start / "state" / UNFINISHED).read_text())
                self.partial.resume(done, unfinished, self.plan.train)
        if config.log.timeline:
            self.timeline = Timeline(self.folder.timeline, processes.named())
        self._services = Services(
            config,
            self.partial or self._pool,
            self.plan.rewards,
            processes.policy,
            processes.critic,
            FeatureStore(processes.policy.encoders, config.learner.features_mib),
            self._stage(self._pool),
            updates_in_parallel=device(config) == "cuda"
            or 2 * config.learner.ranks * (config.learner.threads or cores) <= cores,
            interruptible=self.interrupts.waiting,
            while_waiting=self._handle_outages,
            pictures=PictureWatch(decodes=config.data.check_pictures is not None),
        )
        sync(done, self._prompts(done + 1), self.services, self.state)
        # The pictures that the engines have encoded up to now are not reported. The pictures that the learner has
        # encoded in `sync` are reported with the first iteration.
        self.state.reported = replace(self.state.encodings, learner=0)
        self.done = self.saved = done if self.start else None
        resuming = f", resuming after iteration {done}" if self.start else ""
        self.display.message(f"ready: {self.folder.path}{resuming}")

    def _plan_to_start(self) -> Plan:
        """Returns the plan for starting the processes. In a resumed run, `model.critic` is removed from the plan:
        the critic comes from the checkpoint, and the folder `model.critic` may no longer exist."""
        if self.start is None or self.config.model.critic is None:
            return self.plan
        model = self.config.model.model_copy(update={"critic": None})
        return replace(self.plan, config=self.config.model_copy(update={"model": model}))

    def _stage(self, pool: EnginePool) -> Stage:
        config, rewards = self.config, self.plan.rewards

        def sample_and_score(prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
            scoring, longest = rewards.begin(per_prompt), config.synthesis.online_length
            for index, rollout in pool.sample(prompts, per_prompt, iteration, purpose="messages", longest=longest):
                scoring.add(index, rollout)
            return require_valid(scoring.results(), config.max_invalid_fraction)

        return self.plan.stage(StageTools(config, self.plan.chat, rewards.penalties(), sample_and_score))

    def _replace_engine(self, number: int, died: WorkerDied) -> EngineClient:
        """Replaces an engine that died or hung. If the run is abandoned, `died` is raised instead."""
        if self._abandoned:
            raise died
        engine = self.processes.replace_engine(number, died)
        if self.timeline:
            name = f"engine {number}"
            self.timeline.replaced(name, self.processes.named_engines()[name])
        return engine

    @property
    def processes(self) -> Processes:
        if self._processes is None:
            raise RuntimeError("the processes of the run are not started yet")
        return self._processes

    @property
    def services(self) -> Services:
        if self._services is None:
            raise RuntimeError("the processes of the run are not ready yet")
        return self._services

    def abandon(self) -> None:
        """Kills all processes of the run. This method is called when policy or critic has died. Files that were saved
        stay unchanged."""
        self._abandoned = True
        self.checkpoints.abandon()
        self.state.ahead.abandon()
        if self._processes is not None:
            self._processes.end()

    def close(self) -> None:
        """Ends the thread that samples ahead, the judges and the trackers."""
        self.state.ahead.abandon()
        if self._processes is not None:
            self._processes.close()
        self.trackers.close()

    def _on_outage(self, outage: Outage) -> None:
        """Adds an outage to the queue. Any thread may call this method, but only the main thread may save the run and
        handle outages."""
        self.outages.put(outage)
        if threading.current_thread() is threading.main_thread():
            self._handle_outages()

    def _handle_outages(self) -> None:
        """Handles the queued outages. If an endpoint does not answer, the run is saved and a message is printed. The
        run then waits for the endpoint."""
        while not self.outages.empty():
            outage = self.outages.get()
            if outage.why is None:
                self.display.message(str(outage))
                continue
            if not outage.again:
                self._save_and_report(outage)
            self.processes.revive_judge(outage.endpoint)

    def _save_and_report(self, outage: Outage) -> None:
        if self.done is not None and self.saved != self.done:
            self._save()
        self.checkpoints.settle()
        wait = self.config.endpoints[outage.endpoint].max_wait
        self.display.message(
            f"{outage}; the run waits for this endpoint for up to {wait:.0f} s"
            + (f", everything up to iteration {self.saved} is saved" if self.saved is not None else "")
        )

    def _restore(self, start: Path) -> None:
        counters = checkpoints.counters(start)
        for pending in [
            learner.restore(start / name, start / "state" / name, counters[f"{name}_steps"])
            for name, learner in self.processes.learners.items()
        ]:
            pending.result()

    def _prompts(self, iteration: int) -> list[Prompt]:
        """Returns the rows for which sampling starts in this iteration."""
        places = self.config.prompt_range(iteration)
        return self.plan.order.prompts_at(places.start, len(places))

    def loop(self, done: int) -> None:
        """Runs all iterations after the iteration `done`. Then publishes the final policy and shows the table of
        results."""
        if self.done is None:
            encoded = self.services.features.forwards
            gap = check_rows(self.plan.held_out or self.plan.train, self.services)
            encoded = self.services.features.forwards - encoded  # not part of an iteration, so not reported
            self.state.reported = replace(self.state.reported, learner=self.state.reported.learner + encoded)
            self._record({"iteration": 0, "stage": self.config.stage, **gap, **self._evaluation()})
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
        try:
            metrics, scored = ppo_iteration(iteration, prompts, following, self.services, self.state, clock)
        except Diverged as diverged:
            self.folder.write_rollouts(iteration, diverged.scored)
            raise Stop(
                f"iteration {iteration}: {diverged}. The samples are in {self.folder.rollouts}; lower the "
                "learning rate, or look at the rewards of these samples",
                saves=False,
            ) from diverged
        if evaluates(self.config, iteration) and self.plan.held_out:
            with clock("sync"):
                metrics |= catch_up(iteration, prompts, self.services, self.state)
            metrics |= self._evaluation()
        metrics |= self.state.new_encodings()
        metrics |= self._checkpoint_metrics() | self._replaced_engines()
        self.folder.write_rollouts(iteration, scored, self.config.rollout.save)
        self._record({"iteration": iteration, "stage": self.config.stage, **metrics, **clock.metrics()})
        self.done = iteration
        if self.timeline:
            sampling = self.state.ahead.has(iteration + 1)
            self.timeline.write(busy=self.processes.named_engines() if sampling else ())

    def _replaced_engines(self) -> dict[str, float]:
        assert self._pool is not None
        replaced, self._pool.replaced = self._pool.replaced, 0
        return {"rollout/replaced_engines": float(replaced)}

    def _evaluation(self) -> dict[str, float]:
        if not self.plan.held_out:
            return {}
        self.display.phase("evaluation")
        return evaluate(self.plan.held_out, self.services)

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
        """Starts a checkpoint. Policy and critic copy their state now, and write the copy while the run continues.

        Returns: the counters of the checkpoint, and a function that waits until the checkpoint is written completely.
        """
        learners = self.processes.learners
        pending = {name: one.save(target / name, target / "state" / name) for name, one in learners.items()}
        steps = {f"{name}_steps": one.result() for name, one in pending.items()}
        if self.partial:
            (target / "state").mkdir(exist_ok=True)
            (target / "state" / UNFINISHED).write_text(json.dumps(self.partial.unfinished(self.done or 0)))

        def finish() -> None:
            while not all([learner.written() for learner in learners.values()]):
                time.sleep(POLL_S)

        return {"seed": self.config.seed, **steps}, finish

    def _checkpoint_metrics(self) -> dict[str, float]:
        """Returns the checkpoint/* metrics if a checkpoint was finished in this iteration."""
        self.checkpoints.check()
        metrics: dict[str, float] = {}
        for written in self.checkpoints.take_written():
            metrics = {
                "checkpoint/seconds": written.seconds,
                "checkpoint/blocked_seconds": written.blocked,
                "checkpoint/mib": written.bytes / 2**20,
            }
        return metrics

    def stop_early(self, how: str) -> None:
        """Saves a checkpoint and prints the command that continues the run."""
        if self.done is None:
            self.display.message(f"{how} before the first iteration; nothing to save")
            return
        if self.saved != self.done:
            self._save()
        self.checkpoints.settle()
        self.display.message(
            f"{how} after iteration {self.done}; go on with: python -m rl.run --resume {self.folder.resumable}"
        )

    def _finish(self) -> None:
        self.display.phase("checkpoint")
        self.checkpoints.settle()
        newest = checkpoints.finished(self.folder.checkpoints)[-1]
        checkpoints.publish(newest / "policy", self.folder.policy)
        evaluations = [m for m in self.folder.read_metrics() if any(k.startswith("eval/") for k in m)]
        if evaluations:
            self.display.summary(evaluations[0], evaluations[-1])
        self.display.message(f"policy: {self.folder.policy}")
