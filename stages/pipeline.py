"""Runs a chain: several stages one after the other, each in its own folder. At the end, makes a table of results.

    RUN_DIR/recipe.yaml, recipes/    the recipe of the chain, and the resolved recipe of each step
            rlvr/, rlhf/, pacore/    the run folder of each stage
            curate/                  the rows that a curation between two stages has kept
            metrics.jsonl            the metrics of all stages, in the order of the stages
            policy/                  the last policy
            final/                   answers of the last policy to held-out rows; the table of results (table.json)

A chain can be resumed after an interruption at any point. Finished steps are skipped, and an unfinished step continues.
"""

import hashlib
import json
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
from rl.exits import as_input_error
from rl.interrupt import Interrupts
from rl.recipe.chain import LINK, Chain, Step, saved_chain
from rl.record.checkpoints import publish
from rl.record.disk import hold, write_file
from rl.record.display import Display, families
from rl.record.run_folder import RunFolder, make_run_folder
from rl.stop import GO_ON, Stop, WorkerDied
from rollout.pacore.target import ModelTarget
from stages import stage_class
from stages.curation.run import checked as checked_curation
from stages.evaluation.measure import MODES, EvaluationReport, Questions, measure
from stages.evaluation.scores import ALL, ResultRow, result_rows
from stages.plan import device, make_plan
from stages.train import train

ATTEMPTS = 16
COMPARED = 4  # number of answers per row that the judge compares with the teacher's response
SINGLE_ANSWER = "SeRe pass@1"  # the name of the table's column for single answers
FINAL = "final"
WIDTH = 160  # width of the table in characters if the output is not a terminal


class StageFolder(RunFolder):
    """The run folder of a stage in a chain. The stage's metrics are also written to the chain's metrics.jsonl."""

    chain: Chain

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        super().write_metrics(metrics)
        gather_metrics(self.chain)

    def truncate_after(self, iteration: int) -> None:
        super().truncate_after(iteration)
        gather_metrics(self.chain)


def stage_metrics(chain: Chain) -> dict[str, list[dict[str, Any]]]:
    """Returns the metrics that the stages have written so far: name of the stage -> lines of its metrics.jsonl."""
    return {step.name: RunFolder(chain.of(step)).read_metrics() for step in chain.trained()}


def gather_metrics(chain: Chain) -> None:
    """Writes the chain's metrics.jsonl again. This file joins the metrics.jsonl files of all stages."""
    lines = (line for stage in stage_metrics(chain).values() for line in stage)
    write_file(chain.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def check(chain: Chain, *, offer_truths: bool = False) -> list[str]:
    """Checks everything that can be checked before the first step. Returns the lines that --dry-run prints: the plans
    of all steps.

    A later step is checked with the first step's model, because the later step's own model does not exist yet. With
    `offer_truths`, the rewards read the ground truth of every row (see `make_plan`).
    Raises: ValueError or a subclass if a check fails.
    """
    lines = []
    for step in chain.steps:
        config = _checkable(step, chain)
        check_step = checked_curation if step.curates else make_plan
        plan = check_step(config, offer_truths=offer_truths).lines()
        replaced = _stage_lines(step, config) if _follows_curation(step, chain) else {}
        lines += [f"--- {step.name}", *(_linked(replaced.get(line, line), step, chain) for line in plan)]
    return lines


def _follows_curation(step: Step, chain: Chain) -> bool:
    return any(before.curates for before in chain.before(step)[-1:])


def _stage_lines(step: Step, checked: Config) -> dict[str, str]:
    """During the check, the curated rows do not exist yet, so some lines of the plan are wrong. Returns the
    corrections: wrong line -> correct line."""
    stage = stage_class(checked.stage)
    return dict(zip(stage.plan_lines(checked), stage.plan_lines(step.resolved.config), strict=True))


def _linked(line: str, step: Step, chain: Chain) -> str:
    """Returns a corrected line of a step's plan. The check of a later step uses files of the first step. In the line,
    the names of these files are replaced with the names of the files that earlier steps will write."""
    if step is chain.steps[0]:
        return line
    config, first = step.resolved.config, chain.steps[0].resolved.config
    if line.startswith("model "):
        return f"model      {config.model.path}, critic {config.model.critic or 'new'}"
    if _follows_curation(step, chain) and line.startswith("train "):
        return f"train      the curated rows: {config.data.train[0].path}"
    return line.replace(first.model.path, config.model.path)


def _checkable(step: Step, chain: Chain) -> Config:
    """Returns a config with which a step can be checked. The results of earlier steps do not exist yet, so this config
    contains the names of existing files instead."""
    config, first = step.resolved.config, chain.steps[0].resolved.config
    if step is chain.steps[0]:
        return config
    linked = step.resolved.provenance["model.critic"] == LINK
    critic = None if linked else config.model.critic
    model = config.model.model_copy(update={"path": first.model.path, "critic": critic})
    config = config.model_copy(update={"model": model})
    if not _follows_curation(step, chain):
        return config
    rows = chain.before(step)[-1].resolved.config.data.train
    data = config.data.model_copy(update={"train": rows})
    return stage_class(config.stage).before_curation(config.model_copy(update={"data": data}))


@contextmanager
def _locked(chain: Chain, *, new: bool) -> Iterator[None]:
    """Locks the chain's folder for this process and writes the recipes. Raises InputError if locking fails."""
    with as_input_error():
        if new:
            make_run_folder(chain.folder)
        held = hold(chain.folder)
    with held:
        for name, text in saved_chain(chain).items():
            write_file(chain.folder / name, text.encode())
        yield


def run(chain: Chain, *, new: bool, verbose: bool = False) -> bool:
    """Runs every step that is not finished yet, and then makes the table of results.

    Returns: False if the run was interrupted. An interrupted run is saved and can be resumed.
    Raises: InputError if the results of a step do not fit the next step; Stop if a step cannot continue.
    """
    with _locked(chain, new=new):
        try:
            with Interrupts().installed() as interrupts, interrupts.waiting():
                gather_metrics(chain)
                return all(_run_step(chain, step, verbose=verbose) for step in chain.steps) and _finish(chain)
        except KeyboardInterrupt:  # Interrupted; Ray can raise a KeyboardInterrupt in its place
            return False


def _run_step(chain: Chain, step: Step, *, verbose: bool) -> bool:
    """Runs a step to its end. Does nothing if the step is finished already. Returns False if the step was
    interrupted."""
    print(f"step {chain.steps.index(step) + 1} of {len(chain.steps)}: {step.name}", flush=True)
    if not step.curates:
        return _train(chain, step, verbose=verbose)
    try:
        checked_curation(step.resolved.config).run(chain.of(step), step.resolved.yaml(), verbose=verbose)
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
    with as_input_error():
        plan = make_plan(resolved.config, begun=begun)
        folder = StageFolder.resume(path) if begun else StageFolder.create(path, resolved.yaml())
    folder.chain, folder.resumable = chain, chain.folder
    folder.write_recipe(resolved.yaml())
    # An earlier run with fewer iterations may have written policy/. This folder would mark the stage as finished.
    shutil.rmtree(path / "policy", ignore_errors=True)
    try:
        with Display(resolved.config) as display:
            finished = train(plan, folder, display, recipe=resolved.plain(), verbose=verbose, interrupts=interrupts)
        return finished and not interrupts.stop_requested
    finally:
        folder.release()


def _finish(chain: Chain) -> bool:
    """Publishes the last policy and shows the table of results."""
    publish(chain.of(chain.trained()[-1]) / "policy", chain.folder / "policy")
    print(f"policy: {chain.folder / 'policy'}", flush=True)
    try:
        table = final_table(chain)
    except (RuntimeError, ValueError, OSError, TemplateError) as error:
        raise Stop(f"all stages are done, but the last evaluation failed: {error}; {GO_ON}", saves=False) from error
    write_file(chain.folder / FINAL / "table.json", json.dumps(table.plain(), indent=2).encode() + b"\n")
    table.show(Console(width=None if sys.stdout.isatty() else WIDTH))
    return True


@dataclass(frozen=True)
class FinalTable:
    """The table of results. It has the rewards of greedy answers to held-out rows, before and after each stage, and the
    accuracy of the last policy."""

    stages: Mapping[str, Mapping[str, float]]  # "start" or name of a stage -> task family -> held-out reward
    sampled: tuple[ResultRow, ...]  # results of the last policy at the training temperature
    win_rates: Mapping[str, float]  # "start" or name of a stage -> win rate against the teacher, only if measured
    sampled_win_rate: float | None = None  # win rate of the last policy at the training temperature

    @property
    def families(self) -> list[str]:
        """All task families, in the order in which the stages evaluated them."""
        return list(dict.fromkeys(name for found in self.stages.values() for name in found))

    def plain(self) -> dict[str, Any]:
        """Returns the table as JSON values."""
        sampled = [
            {"task": s.task, "mode": s.name, "accuracy": vars(s.accuracy), "tokens": s.tokens} for s in self.sampled
        ]
        wins = {"win_rate": self.win_rates, "sampled_win_rate": self.sampled_win_rate}
        return {"held_out": self.stages, **wins, "sampled": sampled}

    def show(self, console: Console) -> None:
        """Prints one line per task family. Only table.json has the 95% intervals of the accuracies."""
        first = [SINGLE_ANSWER] if self.sampled_win_rate is not None else []
        sampled = (line.name for line in self.sampled if line.name != f"SeRe pass@{ATTEMPTS}")
        modes = list(dict.fromkeys([*first, *sampled]))
        table = Table(title="held-out reward (greedy) before and after each stage; sampled accuracy of the last policy")
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
            table.add_row(
                "wins against the teacher", *rates, *(last if mode == SINGLE_ANSWER else "" for mode in modes)
            )
        console.print(table)


def before_and_after(
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Returns two mappings: held-out rewards per task family, and win rates. The keys of both mappings are "start" and
    the names of the stages. The values of a stage are measured after this stage.

    Each stage evaluates once before it trains. This first evaluation measures the policy with which the stage starts.
    The results of this evaluation are used for the task families that the previous stage did not evaluate itself. If
    `comparable_evaluation` is False for a stage, the rows of this stage are changed before an evaluation. Then the
    first evaluation of this stage is used only if there is no evaluation of an earlier stage.

    Args:
        stages: name of the stage -> lines of its metrics.jsonl.
    """
    held_out: dict[str, dict[str, float]] = {}
    wins: dict[str, float] = {}
    before = "start"
    for name, lines in stages.items():
        evaluated = [line for line in lines if families(line)]
        comparable = stage_class(name).comparable_evaluation or not held_out
        first = [line for line in evaluated[:1] if line["iteration"] == 0 and comparable]
        for when, line in [*((before, line) for line in first), *((name, line) for line in evaluated[-1:])]:
            held_out[when] = families(line) | held_out.get(when, {})
            if "eval/win_rate" in line:
                wins.setdefault(when, line["eval/win_rate"])
        before = name
    return held_out, wins


def final_table(chain: Chain) -> FinalTable:
    """Evaluates the last policy. Returns the results of all stages, and the results of this evaluation. The answers of
    the policy are stored, so that a repeated evaluation does not sample them again."""
    (chain.folder / FINAL).mkdir(exist_ok=True)
    evaluated = [config for step in chain.trained() if (config := step.resolved.config).data.eval]
    # Measure -> config of the last stage that has this measure
    last = {stage_class(config.stage).final_measure: config for config in evaluated}
    held_out, win_rates = before_and_after(stage_metrics(chain))
    sampled: list[ResultRow] = []
    if config := last.get("accuracy"):
        sampled = result_rows(_measure(chain, config, Questions(MODES, ATTEMPTS)).rows, config, MODES)
    win_rate = None
    if win_rates and (config := last.get("win_rate")):
        win_rate = _measure(chain, config, Questions(("sere",), COMPARED)).preference().get("genrm/win_rate")
    return FinalTable(held_out, tuple(sampled), win_rates, win_rate)


def _measure(chain: Chain, config: Config, questions: Questions) -> EvaluationReport:
    """Evaluates the last policy on the held-out rows of a stage."""
    target = ModelTarget(
        str(chain.of(chain.trained()[-1]) / "policy"), device=device(config), max_length=config.max_sequence_length
    )
    # The name of the cache file contains a digest of the policy's weights and path, so that each policy has its own
    # cache.
    digest = hashlib.sha256(f"{target.model} {target.weights_digest()}".encode()).hexdigest()[:12]
    cache = chain.folder / FINAL / f"{config.stage}-{digest}.jsonl"
    options = {"limit": config.eval.sampled_rows, "seed": config.seed, "cache": cache}
    return measure(config, target, replace(questions, tasks=stage_class(config.stage).final_tasks(config), **options))
