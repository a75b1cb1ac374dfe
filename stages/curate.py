"""From anybody's problems to a stage's training set: `python -m stages.curate RECIPE --out DIR [key=value ...]`.

    DIR/recipe.yaml            the recipe, resolved
        rows/00000.jsonl       rows that stay, as training rows: pool of messages, and in meta.curation why they stayed
        fates/00000.jsonl      what became of each row of the block
        answers/00000-difficulty.jsonl   everything that was answered, as it came
        pictures/              those that came as bytes
        report.txt, report.html

Rows go through the recipe's filters (`curate.filters`, stages/curation/filters.py) in blocks. A block is done when its
file in rows/ is there; the same command goes on where it was broken off, and asks nothing twice. Exit codes are in
rl/exits.py.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rewards.running.async_pool import Outage
from rl.actors import Worker, as_they_come, cluster
from rl.config import ROUNDING, Config
from rl.exits import DONE, InputError, check_hardware, run_command
from rl.interrupt import Interrupts
from rl.recipe.layers import find_recipe
from rl.recipe.resolve import describe, load
from rl.stop import WorkerDied
from rollout.data.decontamination import Benchmarks
from rollout.data.rows import read
from rollout.pacore.prompt import synthesis_template
from rollout.pool import EnginePool
from stages.ahead import Ahead
from stages.curation import report as curation_report
from stages.curation.answers import Answers
from stages.curation.filters import (
    Checked,
    Fate,
    Filter,
    Policy,
    Rated,
    Row,
    Synthesised,
    Tried,
    decontamination,
    row_judges,
)
from stages.curation.folder import Decision, Out
from stages.plan import Plan, make_plan, skipped_lines
from stages.processes import Restarts, Samplers

ORDER = ("decontamination", "checkability", "relevance", "difficulty", "synthesis")  # the report's
ASK_THE_POLICY = {"difficulty", "synthesis"}
SECTIONS = {"seed", "model", "data", "rewards", "endpoints", "rollout", "accept", "synthesis", "curate"}  # that matter
Say = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """The command line of the contract."""
    p = argparse.ArgumentParser(prog="python -m stages.curate", description="Keep the rows that are worth training on.")
    p.add_argument("recipe", help="a shipped recipe's name, e.g. curate, or a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. curate.difficulty.rollouts=8")
    p.add_argument("--out", type=Path, required=True, help="folder to write; one that was begun is gone on with")
    p.add_argument("--profile", help="scale to run at: a name in recipes/profiles (cpu), or a YAML file")
    p.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    p.add_argument("--verbose", action="store_true", help="show what Ray and vLLM log")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parser().parse_intermixed_args(arguments)
    return run_command(lambda: _main(args), resume=f"The same command continues from what is in {args.out}")


def _main(args: argparse.Namespace) -> int:
    resolved = load(find_recipe(args.recipe), profile=args.profile, overrides=args.overrides)
    check_hardware(resolved.config, dry_run=args.dry_run)
    curation = checked(resolved.config)
    if args.dry_run:
        print(describe(resolved, SECTIONS.__contains__), *curation.lines(), sep="\n")
        return DONE
    curation.into(args.out, resolved.yaml(), verbose=args.verbose)
    return DONE


@dataclass(frozen=True)
class Curation:
    """A recipe whose rows, filters and judges fit together."""

    plan: Plan
    benchmarks: Benchmarks | None  # where the recipe decontaminates

    def lines(self) -> list[str]:
        """What will be done, for --dry-run."""
        return lines(self.plan, self.benchmarks)

    def into(self, folder: Path, recipe: str, *, verbose: bool = False) -> None:
        """Everything that is not done yet there. Raises InputError if the folder holds something else."""
        out = Out(folder)
        with out.begun(self.plan.config, recipe, _digest(self.plan)):
            curate(self.plan, out, self.benchmarks, verbose=verbose)


def checked(config: Config) -> Curation:
    """Raises InputError for what cannot be done."""
    try:
        _check_judges(config)
        plan = make_plan(config, row_judges(config))
        _check_thresholds(plan)
        return Curation(plan, _benchmarks(config) if "decontamination" in config.curate.filters else None)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def _check_judges(config: Config) -> None:
    c = config.curate
    if "vote" in c.checkability.params:
        raise InputError("curate.checkability.params: vote is the number of the pass; leave it out")
    for name, options in (("checkability", c.checkability), ("relevance", c.relevance)):
        if name in c.filters and options.endpoint not in config.endpoints:
            known = ", ".join(config.endpoints) or "none"
            raise InputError(f"curate.{name}.endpoint: there is no endpoint {options.endpoint!r} (there are: {known})")
    if "relevance" in c.filters and not config.endpoints[c.relevance.endpoint].images:
        raise InputError(f"endpoints.{c.relevance.endpoint} is shown no pictures; the rater needs `images: true`")


def _check_thresholds(plan: Plan) -> None:
    """An answer that is accepted, and one that is not, must both be possible."""
    found = sorted({prompt.task for prompt in plan.train})
    for task in found if ASK_THE_POLICY & set(plan.config.curate.filters) else ():
        least, lowest, highest = plan.config.accept.of(task), plan.rewards.lowest(task), plan.rewards.highest(task)
        if not lowest < least <= highest + ROUNDING:
            raise InputError(
                f"accept: task {task} is accepted from a reward of {least:g}, but its rewards are between {lowest:g} "
                f"and {highest:g}; set accept.least, or accept.by_task"
            )


def lines(plan: Plan, benchmarks: Benchmarks | None) -> list[str]:
    """What will be done, for --dry-run."""
    c = plan.config.curate
    filters = _applied(plan.config)
    said = {
        "decontamination": f"against {benchmarks.rows if benchmarks else 0} benchmark rows, exactly and by "
        f"{c.decontamination.ngram} words and signs",
        "checkability": f"{c.checkability.passes} pass(es) of {c.checkability.endpoint}, all have to agree",
        "relevance": f"{c.relevance.endpoint} grades at least {c.relevance.at_least:g}",
        "difficulty": f"{c.difficulty.rollouts} responses of {plan.model}, some accepted and not all",
        "synthesis": f"{c.synthesis.rollouts} responses with {plan.config.synthesis.least_messages} to "
        f"{plan.config.synthesis.most_messages} messages, some accepted and not all",
    }
    return [
        f"rows       {sum(map(len, blocks_of(plan)))} of {len(plan.train)}, in blocks of {c.block}",
        *(["skipped    " + line.strip() for line in skipped_lines(plan.skipped)] if plan.skipped else []),
        *(f"filter     {name}: {said[name]}" for name in filters),
    ]


def _applied(config: Config) -> list[str]:
    return [name for name in ORDER if name in config.curate.filters]


def _benchmarks(config: Config) -> Benchmarks:
    """Rows of benchmarks need no task."""
    sources = config.curate.decontamination.against or config.data.eval
    if not sources:
        raise InputError("curate.decontamination.against names no benchmark, and data.eval has none either")
    named = [source.model_copy(update={"task": source.task or "benchmark"}) for source in sources]
    rows = read(named, columns=config.data.columns, unique=False)
    if rows.bad:
        raise InputError("\n".join(["benchmarks:", *map(str, rows.bad[:20])]))
    return Benchmarks(rows.prompts, config.curate.decontamination.ngram)


def curate(plan: Plan, out: Out, benchmarks: Benchmarks | None, *, verbose: bool = False) -> None:
    """Every block that is not done yet, then the report."""
    blocks = blocks_of(plan)
    for line in skipped_lines(plan.skipped) if plan.skipped else ():
        _say(line)
    sources = [source.path for source in plan.config.data.train]
    if left := out.left(len(blocks)):
        _say(f"{len(blocks) - len(left)} of {len(blocks)} blocks are done already")
        with (
            plan.rewards,
            Interrupts().installed() as interrupts,
            interrupts.waiting(),
            _filters(plan, benchmarks, verbose) as filters,
        ):
            work(blocks, filters, out, sources, _say)
    report = curation_report.gather([out.fates(n) for n in range(len(blocks))], _applied(plan.config), sources)
    out.write(out.path / "report.txt", report.text().encode("utf-8", "backslashreplace"))
    out.write(out.path / "report.html", report.html().encode("utf-8", "backslashreplace"))
    _say(report.text())
    _say(f"rows: {out.path / 'rows'}, report: {out.path / 'report.html'}")


def blocks_of(plan: Plan) -> list[list[Row]]:
    """The rows in their order, or `curate.rows` of them, spread evenly."""
    options = plan.config.curate
    rows = [Row(prompt, source) for prompt, source in zip(plan.train, plan.sources, strict=True)]
    if options.rows is not None and options.rows < len(rows):
        rows = [rows[place * len(rows) // options.rows] for place in range(options.rows)]
    return [rows[start : start + options.block] for start in range(0, len(rows), options.block)]


def work(
    blocks: Sequence[Sequence[Row]], filters: Mapping[str, Filter], out: Out, sources: Sequence[str], say: Say
) -> None:
    """Blocks that are not done yet, one after the other; judges look at the next while the policy tries this one."""
    judging = {name: decide for name, decide in filters.items() if name not in ASK_THE_POLICY}
    trying = {name: decide for name, decide in filters.items() if name in ASK_THE_POLICY}
    ahead: Ahead[list[Decision]] = Ahead()

    def some(number: int, fates: Sequence[Decision], which: Mapping[str, Filter]) -> list[Decision]:
        def told(message: str) -> None:
            ahead.check()
            say(f"block {number + 1}: {message}")

        return through(fates, which, lambda name: Answers(out.answers(number, name)), told)

    def judged(number: int) -> list[Decision]:
        return some(number, [("", Fate(row)) for row in blocks[number]], judging)

    left = out.left(len(blocks))
    try:
        for number, following in zip(left, [*left[1:], None], strict=True):
            fates = ahead.take(number, lambda: None) if ahead.has(number) else judged(number)
            if judging and trying and following is not None:
                ahead.start(following, lambda n=following: judged(n))
            fates = some(number, fates, trying)
            out.finish(number, fates, sources)
            stay = sum(fate.dropped is None for _, fate in fates)
            say(f"block {number + 1} of {len(blocks)} is done: {stay} of {len(fates)} rows stay")
    finally:
        ahead.abandon()


def _say(message: str) -> None:
    print(message, flush=True)


def through(
    fates: Sequence[Decision], filters: Mapping[str, Filter], answers: Callable[[str], Answers], say: Say
) -> list[Decision]:
    """What becomes of each row after more filters, in order."""
    found = dict(enumerate(fates))
    for name, decide in filters.items():
        left = [number for number, (_, fate) in found.items() if fate.dropped is None]
        start = time.monotonic()
        with answers(name) as known:
            before = len(known.known)
            decided = decide([found[number][1].row for number in left], known)
        for number, fate in zip(left, decided, strict=True):
            found[number] = (name if fate.dropped is not None else "", fate)
        stay = sum(fate.dropped is None for fate in decided)
        seconds = time.monotonic() - start
        say(f"{name}: {stay} of {len(left)} rows stay ({seconds:.0f} s, {before} answers were known)")
    return [found[number] for number in range(len(fates))]


@contextmanager
def _filters(plan: Plan, benchmarks: Benchmarks | None, verbose: bool) -> Iterator[Mapping[str, Filter]]:
    """The recipe's filters in the report's order, with the processes that they ask."""
    config, c = plan.config, plan.config.curate
    limit = config.max_invalid_fraction
    made: dict[str, Filter] = {}
    if benchmarks:
        made["decontamination"] = decontamination(benchmarks)
    made["checkability"] = Checked(c.checkability, plan.rewards, limit)
    made["relevance"] = Rated(c.relevance, plan.rewards, limit)
    with cluster(verbose=verbose), _samplers(plan, verbose) as pool:
        if pool is not None:
            policy = Policy(pool, plan.chat, plan.rewards, config.rollout.temperature, config.seed, limit)
            made["difficulty"] = Tried(c.difficulty, config.accept, policy, config.max_sequence_length)
            made["synthesis"] = Synthesised(c.synthesis, config.synthesis, config.accept, policy)
        yield {name: made[name] for name in _applied(config)}


@contextmanager
def _samplers(plan: Plan, verbose: bool) -> Iterator[EnginePool | None]:
    """The engines, if a filter asks the policy, and the judges that the recipe has served."""
    config = plan.config
    asks = ASK_THE_POLICY & set(config.curate.filters)
    longest = config.max_sequence_length
    if "synthesis" in asks:
        longest = max(longest, config.curate.synthesis.max_sequence_length)
    samplers = Samplers(plan, longest=longest, engines=config.rollout.workers if asks else 0, verbose=verbose)
    restarts = Restarts(config.max_restarts, _say)

    def replaced(number: int, died: WorkerDied) -> Worker:
        restarts.count(f"engine {number} is replaced: {died}")
        return samplers.replace_engine(number)

    def heard(outage: Outage) -> None:
        if not outage.again:
            _say(_outage(outage))
        if outage.why is not None:
            samplers.revive_judge(outage.endpoint, restarts)

    plan.rewards.on_outage = heard
    try:
        samplers.ready()
        yield (
            EnginePool(
                samplers.engines,
                as_they_come,
                plan.chat,
                max_sequence_length=longest,
                temperature=config.rollout.temperature,
                seed=config.seed,
                patience=config.rollout.patience_s,
                replacement=replaced,
            )
            if asks
            else None
        )
    finally:
        try:
            samplers.close()
        except RuntimeError as error:  # must not hide why the work ends
            _say(f"a judge's server did not end in good order: {error}")


def _outage(outage: Outage) -> str:
    if outage.why is None:
        return f"endpoint {outage.endpoint} is back after {outage.seconds:.0f} s"
    return f"endpoint {outage.endpoint} does not answer ({outage.why}); waiting"


def _digest(plan: Plan) -> str:
    """Of all files that filters go by."""
    found = hashlib.sha256()
    for prompt, source in zip(plan.train, plan.sources, strict=True):
        seen = [
            prompt.id, prompt.task, prompt.messages, prompt.ground_truth, prompt.reference, prompt.meta,
            prompt.messages_pool, prompt.pool_accuracy, prompt.pool_accepted, source,
            [picture.digest for picture in prompt.images],
        ]  # fmt: skip
        found.update(json.dumps(seen, sort_keys=True).encode())
    c = plan.config.curate
    against = c.decontamination.against or plan.config.data.eval
    files = [Path(source.path) for source in against] if "decontamination" in c.filters else []
    template = synthesis_template(plan.model, plan.config.synthesis.template)
    files += [template] if "synthesis" in c.filters and template else []
    for file in files:
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
