"""Several stages as one run: each in a folder of its own, one after the other, and at the end one table.

    RUN_DIR/recipe.yaml, recipes/    the chain's recipe, and each step's, resolved
            rlvr/, rlhf/, pacore/    a run's folder for each stage
            curate/                  the rows that were curated in between
            metrics.jsonl            the lines of all stages, in their order
            policy/                  the last policy
            final/                   what it answered to held-out rows, and the table (table.json)

A step that is done is not done again, one that was begun goes on: a chain resumes wherever it was broken off.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.table import Table

from rl.config import Config
from rl.exits import InputError
from rl.interrupt import Interrupted, Interrupts
from rl.recipe.chain import LINK, Chain, Step, saved_chain
from rl.record.checkpoints import publish
from rl.record.disk import hold, replacing, writing
from rl.record.display import Display, families
from rl.record.run_folder import RunFolder, make_run_folder
from rl.stop import GO_ON, Stop, WorkerDied
from rollout.pacore.target import ModelTarget
from stages import curate
from stages.evaluation.measure import Questions, Report, measure
from stages.evaluation.scores import ALL, ResultRow, result_rows
from stages.plan import Plan, device, make_plan
from stages.train import train

MODES = ("sere", "majority", "pacore")
ATTEMPTS = 16
COMPARED = 4  # answers to a row that a judge compares with the teacher's
ONE_CHAIN = "SeRe pass@1"  # the column of single answers
FINAL = "final"
WIDTH = 160  # columns of the table where there is no terminal


class StageFolder(RunFolder):
    """A stage's folder, whose metrics appear in the chain's as well."""

    chain: Chain

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        super().write_metrics(metrics)
        gather_metrics(self.chain)

    def truncate_after(self, iteration: int) -> None:
        super().truncate_after(iteration)
        gather_metrics(self.chain)


def stage_metrics(chain: Chain) -> dict[str, list[dict[str, Any]]]:
    """The lines of each stage so far."""
    return {step.name: RunFolder(chain.of(step)).read_metrics() for step in chain.trained()}


def gather_metrics(chain: Chain) -> None:
    """Writes the chain's metrics.jsonl anew, from those of its stages."""
    target = chain.folder / "metrics.jsonl"
    with writing(target), replacing(target) as file:
        for lines in stage_metrics(chain).values():
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def check(chain: Chain) -> list[str]:
    """Everything that can be checked before the first step; what each will do, for --dry-run.

    Later steps are checked with the model that the first one starts from, and PaCoRe with rows that have no pools yet.
    Raises: ValueError of several kinds.
    """
    told = []
    for step in chain.steps:
        config = _checkable(step, chain)
        lines = curate.checked(config).lines() if step.curates else make_plan(config).lines()
        told += [f"--- {step.name}", *(_linked(line, step, chain) for line in lines)]
    return told


def _linked(line: str, step: Step, chain: Chain) -> str:
    """A line of a step's plan, with what earlier steps will leave in the place of its stand-in."""
    if step is chain.steps[0]:
        return line
    config, first = step.resolved.config, chain.steps[0].resolved.config
    if line.startswith("model "):
        return f"model      {config.model.path}, critic {config.model.critic or 'new'}"
    if chain.before(step)[-1].curates and line.startswith("train "):
        return f"train      what curation leaves: {config.data.train[0].path}"
    if chain.before(step)[-1].curates and line.startswith("messages "):
        return f"messages   {config.synthesis.least_messages} to {config.synthesis.most_messages} of the rows' pools"
    return line.replace(first.model.path, config.model.path)


def _checkable(step: Step, chain: Chain) -> Config:
    """The step's config with stand-ins for what earlier steps will leave."""
    config, first = step.resolved.config, chain.steps[0].resolved.config
    if step is chain.steps[0]:
        return config
    linked = step.resolved.provenance["model.critic"] == LINK
    critic = None if linked else config.model.critic
    model = config.model.model_copy(update={"path": first.model.path, "critic": critic})
    changes: dict[str, Any] = {"model": model}
    before = chain.before(step)[-1]
    if before.curates:
        data = config.data.model_copy(update={"train": before.resolved.config.data.train})
        changes |= {"data": data, "synthesis": config.synthesis.model_copy(update={"pool": "online"})}
    return config.model_copy(update=changes)


@contextmanager
def _held(chain: Chain, *, new: bool) -> Iterator[None]:
    """The chain's folder with its recipes, for this process alone. Raises InputError if that cannot be."""
    try:
        if new:
            make_run_folder(chain.folder)
        held = hold(chain.folder)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    try:
        for name, text in saved_chain(chain).items():
            target = chain.folder / name
            with writing(target):
                target.parent.mkdir(exist_ok=True)
                with replacing(target) as file:
                    file.write(text.encode())
        yield
    finally:
        if held is not None:
            os.close(held)


def run(chain: Chain, *, new: bool, verbose: bool = False) -> bool:
    """Every step that is not done yet, then the table.

    Returns: False if the run was interrupted; it has saved and can be resumed.
    Raises: InputError for what does not fit after all; Stop.
    """
    with _held(chain, new=new):
        try:
            with Interrupts().installed() as interrupts, interrupts.waiting():
                gather_metrics(chain)
                return all(_done(chain, step, verbose=verbose) for step in chain.steps) and _finish(chain)
        except Interrupted:
            return False


def _done(chain: Chain, step: Step, *, verbose: bool) -> bool:
    """A step to its end, if it is not there yet. Returns False if it was interrupted."""
    print(f"step {chain.steps.index(step) + 1} of {len(chain.steps)}: {step.name}", flush=True)
    if not step.curates:
        return _train(chain, step, verbose=verbose)
    try:
        curate.checked(step.resolved.config).into(chain.of(step), step.resolved.yaml(), verbose=verbose)
    except WorkerDied as died:
        raise Stop(f"{died}; {GO_ON}", saves=False) from died
    return True


def _train(chain: Chain, step: Step, *, verbose: bool) -> bool:
    path, resolved, interrupts = chain.of(step), step.resolved, Interrupts()
    begun = (path / "recipe.yaml").is_file()
    lines = RunFolder(path).read_metrics()
    if (path / "policy").is_dir() and lines and lines[-1]["iteration"] >= resolved.config.iterations:
        print(f"{step.name} is done already: {path}", flush=True)
        return True
    try:
        plan: Plan = make_plan(resolved.config, begun=begun)
        folder = StageFolder.resume(path) if begun else StageFolder.create(path, resolved.yaml())
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    folder.chain, folder.resumable = chain, chain.folder
    folder.write_recipe(resolved.yaml())
    shutil.rmtree(path / "policy", ignore_errors=True)  # of a shorter run: while it is there, the stage counts as done
    try:
        with Display(resolved.config) as display:
            finished = train(plan, folder, display, recipe=resolved.plain(), verbose=verbose, interrupts=interrupts)
        return finished and not interrupts.stop_requested
    finally:
        folder.release()


def _finish(chain: Chain) -> bool:
    """The last policy, and how good it has become."""
    publish(chain.of(chain.trained()[-1]) / "policy", chain.folder / "policy")
    print(f"policy: {chain.folder / 'policy'}", flush=True)
    try:
        table = final_table(chain)
    except (RuntimeError, ValueError, OSError, TemplateError) as error:
        raise Stop(f"all stages are done, but the last evaluation failed: {error}; {GO_ON}", saves=False) from error
    target = chain.folder / FINAL / "table.json"
    with writing(target), replacing(target) as file:
        file.write(json.dumps(table.plain(), indent=2).encode() + b"\n")
    table.show(Console(width=None if sys.stdout.isatty() else WIDTH))
    return True


@dataclass(frozen=True)
class FinalTable:
    """Held-out rewards before and after each stage, greedy, and how well the last policy thinks in parallel."""

    stages: Mapping[str, Mapping[str, float]]  # "start" and each stage -> family -> held-out reward
    sampled: tuple[ResultRow, ...]  # of the last policy, at the training temperature
    win_rates: Mapping[str, float]  # before and after a stage that compares with a teacher
    sampled_win_rate: float | None = None  # of the last policy

    @property
    def families(self) -> list[str]:
        """Verifiable or not, as the stages met them."""
        return list(dict.fromkeys(name for found in self.stages.values() for name in found))

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        sampled = [
            {"task": s.task, "mode": s.name, "accuracy": vars(s.accuracy), "tokens": s.tokens} for s in self.sampled
        ]
        wins = {"win_rate": self.win_rates, "sampled_win_rate": self.sampled_win_rate}
        return {"held_out": self.stages, **wins, "sampled": sampled}

    def show(self, console: Console) -> None:
        """A line for each family; accuracies with their 95% intervals are in table.json."""
        first = [ONE_CHAIN] if self.sampled_win_rate is not None else []
        sampled = (line.name for line in self.sampled if line.name != f"SeRe pass@{ATTEMPTS}")
        modes = list(dict.fromkeys([*first, *sampled]))
        table = Table(title="held-out reward (greedy) before and after each stage; the last policy's accuracy, sampled")
        for title in ("family", *self.stages, *modes):
            table.add_column(title, justify="left" if title == "family" else "right")
        accuracy = {(line.task, line.name): f"{line.accuracy.mean:.3f}" for line in self.sampled}
        for family in (*self.families, ALL):
            rewards = [f"{found[family]:.3f}" if family in found else "" for found in self.stages.values()]
            table.add_row(family, *rewards, *(accuracy.get((family, mode), "") for mode in modes))
        if self.win_rates or self.sampled_win_rate is not None:
            table.add_section()
            rates = [f"{self.win_rates[name]:.3f}" if name in self.win_rates else "" for name in self.stages]
            last = "" if self.sampled_win_rate is None else f"{self.sampled_win_rate:.3f}"
            table.add_row("wins against the teacher", *rates, *(last if mode == ONE_CHAIN else "" for mode in modes))
        console.print(table)


def before_and_after(
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Held-out rewards of each family and win rates, at the start and after each stage, from the stages' metrics.

    What a stage evaluates before it trains tells how the stage before has left the families that only this one has;
    but for PaCoRe, which evaluates answers to messages.
    """
    held_out: dict[str, dict[str, float]] = {}
    wins: dict[str, float] = {}
    before = "start"
    for name, lines in stages.items():
        evaluated = [line for line in lines if families(line)]
        first = [line for line in evaluated[:1] if line["iteration"] == 0 and (name != "pacore" or not held_out)]
        for when, line in [*((before, line) for line in first), *((name, line) for line in evaluated[-1:])]:
            held_out[when] = families(line) | held_out.get(when, {})
            if "eval/win_rate" in line:
                wins.setdefault(when, line["eval/win_rate"])
        before = name
    return held_out, wins


def final_table(chain: Chain) -> FinalTable:
    """What the stages' metrics say, and a last evaluation of the policy, which keeps what it asked."""
    (chain.folder / FINAL).mkdir(exist_ok=True)
    evaluated = [config for step in chain.trained() if (config := step.resolved.config).data.eval]
    checked = [config for config in evaluated if config.stage != "rlhf"]
    compared = [config for config in evaluated if config.stage == "rlhf"]
    held_out, won = before_and_after(stage_metrics(chain))
    sampled: list[ResultRow] = []
    if checked:
        sampled = result_rows(_answers(chain, checked[-1], Questions(MODES, ATTEMPTS)).rows, checked[-1], MODES)
    wins = None
    if compared and won:
        unchecked = compared[-1].rewards.keys() - set(compared[-1].preference.verifiable_tasks)
        asked = Questions(("sere",), COMPARED, tasks=unchecked)
        wins = _answers(chain, compared[-1], asked).preference().get("genrm/win_rate")
    return FinalTable(held_out, tuple(sampled), won, wins)


def _answers(chain: Chain, config: Config, asked: Questions) -> Report:
    """Those of the last policy to held-out rows of a stage."""
    who = ModelTarget(
        str(chain.of(chain.trained()[-1]) / "policy"), device=device(config), max_length=config.max_sequence_length
    )
    # Another policy, or another place, is asked anew.
    asked_of = hashlib.sha256(f"{who.model} {who.weights()}".encode()).hexdigest()[:12]
    cache = chain.folder / FINAL / f"{config.stage}-{asked_of}.jsonl"
    return measure(config, who, replace(asked, limit=config.eval.sampled_rows, seed=config.seed, cache=cache))
