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

from rewards.running.runner import Outage
from rl.actors import Worker, as_they_come, cluster, gather
from rl.interrupt import Interrupted, Interrupts
from rl.learner.features import FeatureStore
from rl.record import checkpoints
from rl.record.checkpoints import Checkpoints
from rl.record.display import Display
from rl.record.run_folder import RunFolder
from rl.record.timeline import Timeline
from rl.record.tracking import Trackers
from rl.stop import Stop, WorkerDied
from rl.types import Prompt, Scored
from rollout.partial import PartialRollouts
from rollout.pool import EnginePool
from stages.loop import Clock, Diverged, Parts, Stage, catch_up, enough_valid, evaluate, ppo_iteration, sync
from stages.pacore import Pacore
from stages.plan import Plan, device, evaluates, saves, skipped_lines
from stages.processes import Processes, Restarts
from stages.rlhf import Rlhf
from stages.rlvr import Rlvr

POLL_S = 0.2  # between questions whether a checkpoint is written
BEGUN = "begun.json"  # in a checkpoint's state: responses under way, where the recipe has partial rollouts


def train(
    plan: Plan,
    folder: RunFolder,
    display: Display,
    *,
    recipe: Mapping[str, Any],
    verbose: bool = False,
    interrupts: Interrupts | None = None,
) -> bool:
    """Run the plan to its end, continuing from the newest whole checkpoint in `folder` if there is one.

    When policy or critic die, all is started again from there, up to `max_restarts` times. Whoever passes `interrupts`
    learns whether the run was asked to stop when it was all but done.
    Returns: False if the run was interrupted; it has saved and can be resumed.
    """
    interrupts, restarts = interrupts or Interrupts(), Restarts(plan.config.max_restarts, display.message)
    if plan.skipped:
        display.message("\n".join(skipped_lines(plan.skipped)))
    with interrupts.installed(), plan.rewards, cluster(verbose=verbose):
        while True:
            run = _Run(plan, folder, display, interrupts, restarts, recipe, verbose=verbose)
            try:
                run.whole()
                return True
            except Interrupted:
                run.stop_early("interrupted")
                return False
            except Stop as stop:
                if stop.saves:
                    run.stop_early("stopped")
                raise
            except WorkerDied as died:
                run.give_up()
                restarts.count(f"{died}. Starting again from what is saved")
            finally:
                run.close()


class _Run:
    """The parts of a run and where it stands."""

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
        self.begins = checkpoints.counters(self.start)["iteration"] if self.start else -1  # after it; -1: anew
        folder.truncate_after(self.begins)
        self.trackers = Trackers(self.config.log.trackers, folder.path, recipe=recipe, first_step=self.begins + 1)
        self.done: int | None = None  # iterations whose effects are in the learner, once it is ready
        self.saved: int | None = None  # the newest of them that a checkpoint holds
        self._processes: Processes | None = None  # once they are placed
        self._parts: Parts | None = None  # likewise
        self._pool: EnginePool | None = None
        self._given_up = False
        self.partial: PartialRollouts | None = None  # if the recipe asks for it
        self.timeline: Timeline | None = None  # likewise
        self.outages: queue.SimpleQueue[Outage] = queue.SimpleQueue()
        plan.rewards.on_outage = self._hear

    def whole(self) -> None:
        """Everything, to the end."""
        with self.interrupts.waiting():
            self.begin()
        self.loop(max(self.begins, 0))

    def begin(self) -> None:
        """Place engines, policy and critic side by side, and bring them to where the run stands."""
        config, cores, done = self.config, os.cpu_count() or 1, max(self.begins, 0)
        self._processes = processes = Processes(self._placed(), verbose=self.verbose)
        processes.ready()
        if self.start:
            self._restore(self.start)
        self._pool = EnginePool(
            processes.engines,
            as_they_come,
            self.plan.chat,
            max_sequence_length=config.max_sequence_length,
            temperature=config.rollout.temperature,
            seed=config.seed,
            check_tokens=config.rollout.logprob_check_tokens,
            patience=config.rollout.patience_s,
            replacement=self._replace_engine,
        )
        if partial := config.rollout.partial:
            self.partial = PartialRollouts(self._pool, wanted=config.prompts_per_iteration, chunk=partial.chunk_tokens)
            if self.start:
                self.partial.resume(done, json.loads((self.start / "state" / BEGUN).read_text()), self.plan.train)
        if config.log.timeline:
            self.timeline = Timeline(self.folder.timeline, processes.named())
        self._parts = Parts(
            config,
            self.partial or self._pool,
            self.plan.rewards,
            processes.policy,
            processes.critic,
            FeatureStore(processes.policy.workers, config.learner.features_mib),
            self._stage(self._pool),
            phase=self.display.phase,
            interruptible=self.interrupts.waiting,
            meanwhile=self._ride_out,
            side_by_side=device(config) == "cuda"
            or 2 * config.learner.ranks * (config.learner.threads or cores) <= cores,
        )
        sync(done, self._prompts(done + 1), self.parts)
        # The engines' own start-up is not counted. What the check has shown the learner are the coming pictures.
        self.parts.told = replace(self.parts.encodings, learner=0)
        self.done = self.saved = done if self.start else None
        resuming = f", resuming after iteration {done}" if self.start else ""
        self.display.message(f"ready: {self.folder.path}{resuming}")

    def _placed(self) -> Plan:
        """The plan; a run that goes on has its critic in the checkpoint, and the one that it began with may be gone."""
        if self.start is None or self.config.model.critic is None:
            return self.plan
        model = self.config.model.model_copy(update={"critic": None})
        return replace(self.plan, config=self.config.model_copy(update={"model": model}))

    def _stage(self, pool: EnginePool) -> Stage:
        config, plan = self.config, self.plan

        def attempts(prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
            scoring, longest = plan.rewards.begin(per_prompt), config.synthesis.online_length
            pool.sample(prompts, per_prompt, iteration, scoring.add, purpose="messages", longest=longest)
            return enough_valid(scoring.results(), config.max_invalid_fraction)

        if config.stage == "pacore":
            return Pacore(config.synthesis, config.accept, config.seed, plan.chat, config.max_sequence_length, attempts)
        if config.stage == "rlhf":
            return Rlhf(plan.rewards.penalties())
        return Rlvr()

    def _replace_engine(self, number: int, died: WorkerDied) -> Worker:
        """Another engine in the place of one that died or hung, unless all are about to end."""
        if self._given_up:
            raise died
        self.restarts.count(f"engine {number} is replaced: {died}")
        worker = self.processes.replace_engine(number)
        if self.timeline:
            self.timeline.replaced(f"engine {number}", worker)
        return worker

    @property
    def processes(self) -> Processes:
        if self._processes is None:
            raise RuntimeError("the processes of the run are not placed yet")
        return self._processes

    @property
    def parts(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("the parts of the run are not placed yet")
        return self._parts

    def give_up(self) -> None:
        """Leave everything as it is saved: a process that others need has died."""
        self._given_up = True
        self.checkpoints.abandon()
        if self._parts is not None:
            self._parts.ahead.abandon()
        if self._processes is not None:
            self._processes.end()

    def close(self) -> None:
        """End what runs beside the main thread, the judges in good order, and the trackers."""
        if self._parts is not None:
            self._parts.ahead.abandon()
        try:
            if self._processes is not None:
                self._processes.close()
        except RuntimeError as error:  # must not hide why the run ends
            self.display.message(f"a judge's server did not end in good order: {error}")
        self.trackers.close()

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
        if not outage.again:
            self._wait_for(outage)
        self.processes.revive_judge(outage.endpoint, self.restarts)

    def _wait_for(self, outage: Outage) -> None:
        if self.done is not None and self.saved != self.done:
            self._save()
        self.checkpoints.settle()
        wait = self.config.endpoints[outage.endpoint].max_wait
        self.display.message(
            f"endpoint {outage.endpoint} does not answer ({outage.why}); waiting for up to {wait:.0f} s"
            + (f", everything up to iteration {self.saved} is saved" if self.saved is not None else "")
        )

    def _restore(self, start: Path) -> None:
        counters = checkpoints.counters(start)
        gather(
            [
                team.start("restore", start / name, start / "state" / name, counters[f"{name}_steps"])
                for name, team in self.processes.teams.items()
            ]
        )

    def _prompts(self, iteration: int) -> list:
        asked = self.config.prompt_range(iteration)
        return self.plan.order.prompts_at(asked.start, len(asked))

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
        try:
            metrics, scored = ppo_iteration(iteration, prompts, following, self.parts, clock)
        except Diverged as diverged:
            self.folder.write_rollouts(iteration, diverged.scored)
            raise Stop(
                f"iteration {iteration}: {diverged}. Its samples are in {self.folder.rollouts}; lower the learning "
                "rate, or look at their rewards",
                saves=False,
            ) from diverged
        if evaluates(self.config, iteration) and self.plan.held_out:
            with clock("sync"):
                metrics |= catch_up(iteration, prompts, self.parts)
            metrics |= self._evaluation()
        metrics |= self.parts.new_encodings()
        metrics |= self._checkpoint_metrics() | self._replaced_engines()
        self.folder.write_rollouts(iteration, scored, self.config.rollout.save)
        self._record({"iteration": iteration, "stage": self.config.stage, **metrics, **clock.metrics()})
        self.done = iteration
        if self.timeline:
            self.timeline.write(busy=self.processes.named_engines() if self.parts.ahead.has(iteration + 1) else ())

    def _replaced_engines(self) -> dict[str, float]:
        assert self._pool is not None
        replaced, self._pool.replaced = self._pool.replaced, 0
        return {"rollout/replaced_engines": float(replaced)}

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
            name: team.start("save", target / name, target / "state" / name)
            for name, team in self.processes.teams.items()
        }
        steps = {f"{name}_steps": one.result() for name, one in pending.items()}
        if self.partial:
            (target / "state").mkdir(exist_ok=True)
            (target / "state" / BEGUN).write_text(json.dumps(self.partial.left(self.done or 0)))
        workers = [worker for team in self.processes.teams.values() for worker in team.workers]

        def finish() -> None:
            while not all(gather([worker.start("written") for worker in workers])):
                time.sleep(POLL_S)

        return {"seed": self.config.seed, **steps}, finish

    def _checkpoint_metrics(self) -> dict[str, float]:
        """Of the one that was finished in this iteration, if one was."""
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
        """Keep what has been learned."""
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
