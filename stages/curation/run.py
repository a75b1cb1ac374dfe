"""Checks and runs a curation. Rows pass through the recipe's filters (`curate.filters`) in blocks.

A block is finished when its file in rows/ exists. After an interruption, a curation continues in the same folder.

Tested in tests/stages/curation/test_run.py.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rewards.running.async_pool import Outage
from rl.actors import cluster
from rl.config import ROUNDING, Config
from rl.exits import InputError, as_input_error
from rl.interrupt import Interrupts
from rl.record.disk import write_file
from rollout.data.decontamination import Benchmarks
from rollout.data.rows import read
from rollout.pacore.prompt import synthesis_template
from rollout.pool import EnginePool
from stages.ahead import Ahead
from stages.curation.answers import Answers
from stages.curation.filters import (
    CandidateRow,
    CheckabilityFilter,
    Decision,
    DecontaminationFilter,
    DifficultyFilter,
    Filter,
    RelevanceFilter,
    SynthesisFilter,
)
from stages.curation.folder import CurationFolder
from stages.curation.judges import row_judges
from stages.curation.report import make_report
from stages.curation.sampling import PolicySampler
from stages.plan import Plan, make_plan, skipped_lines
from stages.processes import Restarts, Samplers

ORDER = ("decontamination", "checkability", "relevance", "difficulty", "synthesis")  # the order of the STEP3-VL report
POLICY_FILTERS = {"difficulty", "synthesis"}  # filters that sample responses of the policy
SECTIONS = {"seed", "model", "data", "rewards", "endpoints", "rollout", "accept", "synthesis", "curate"}
"""The sections of a recipe that a curation uses."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Curation:
    """A checked curation: its recipe, rows, filters and judges fit together."""

    plan: Plan
    benchmarks: Benchmarks | None  # None if the recipe does not use the filter decontamination

    def lines(self) -> list[str]:
        """Returns the plan of this curation as lines, for --dry-run."""
        plan, c = self.plan, self.plan.config.curate
        texts = {
            "decontamination": f"{self.benchmarks.rows if self.benchmarks else 0} benchmark rows; a row is dropped if "
            "its question is also a benchmark question, or if it contains a sequence of "
            f"{c.decontamination.ngram} words and signs from a benchmark question",
            "checkability": f"{c.checkability.passes} pass(es) of {c.checkability.endpoint}; in every "
            "pass, the judge must call the row valid",
            "relevance": f"the grade of {c.relevance.endpoint} must be at least {c.relevance.at_least:g}",
            "difficulty": f"{c.difficulty.rollouts} responses of {plan.model}; some but not all must be accepted",
            "synthesis": f"{c.synthesis.rollouts} responses to prompts with {plan.config.synthesis.least_messages} to "
            f"{plan.config.synthesis.most_messages} messages; some but not all must be accepted",
        }
        return [
            f"rows       {sum(map(len, blocks_of(plan)))} of {len(plan.train)}, in blocks of {c.block}",
            *(f"skipped    {line.strip()}" for line in skipped_lines(plan.skipped)),
            *(f"filter     {name}: {texts[name]}" for name in _filter_names(plan.config)),
        ]

    def run(self, path: Path, recipe: str, *, verbose: bool = False) -> None:
        """Runs the unfinished blocks of the curation in `path`, then writes the report.

        Args:
            recipe: the text of the resolved recipe.
        Raises: InputError if the folder contains anything other than this curation.
        """
        folder, plan, blocks = CurationFolder(path), self.plan, blocks_of(self.plan)
        sources = [source.path for source in plan.config.data.train]
        with folder.locked(plan.config, recipe, _digest(plan)):
            for line in skipped_lines(plan.skipped):
                _say(line)
            if unfinished := folder.unfinished(len(blocks)):
                _say(f"{len(blocks) - len(unfinished)} of {len(blocks)} blocks are done already")
                with (
                    plan.rewards,
                    Interrupts().installed() as interrupts,
                    interrupts.waiting(),
                    _filters(plan, self.benchmarks, verbose) as filters,
                ):
                    run_blocks(blocks, filters, folder, sources, _say)
            decisions = [folder.decisions(number) for number in range(len(blocks))]
            report = make_report(decisions, _filter_names(plan.config), sources)
            write_file(path / "report.txt", report.text().encode("utf-8", "backslashreplace"))
            write_file(path / "report.html", report.html().encode("utf-8", "backslashreplace"))
            _say(report.text())
            _say(f"rows: {path / 'rows'}, report: {path / 'report.html'}")


def checked(config: Config, *, offer_truths: bool = False) -> Curation:
    """Checks a recipe and returns its curation. With `offer_truths`, the rewards read the ground truth of every row
    (see `make_plan`). Raises InputError if the curation cannot be run."""
    with as_input_error():
        _check_judges(config)
        plan = make_plan(config, row_judges(config), offer_truths=offer_truths)
        _check_thresholds(plan)
        return Curation(plan, _benchmarks(config) if "decontamination" in config.curate.filters else None)


def _check_judges(config: Config) -> None:
    c = config.curate
    if "vote" in c.checkability.params:
        raise InputError("curate.checkability.params: the code sets `vote` to the number of the pass; leave it out")
    for name, options in (("checkability", c.checkability), ("relevance", c.relevance)):
        if name in c.filters and options.endpoint not in config.endpoints:
            known = ", ".join(config.endpoints) or "none"
            raise InputError(f"curate.{name}.endpoint: there is no endpoint {options.endpoint!r} (there are: {known})")
    if "relevance" in c.filters and not config.endpoints[c.relevance.endpoint].images:
        raise InputError(f"endpoints.{c.relevance.endpoint} gets no pictures; the filter relevance needs images: true")


def _check_thresholds(plan: Plan) -> None:
    """Raises InputError if the threshold of a task accepts all possible rewards, or rejects all of them."""
    tasks = sorted({prompt.task for prompt in plan.train})
    for task in tasks if POLICY_FILTERS & set(plan.config.curate.filters) else ():
        least, lowest, highest = plan.config.accept.of(task), plan.rewards.lowest(task), plan.rewards.highest(task)
        if not lowest < least <= highest + ROUNDING:
            raise InputError(
                f"accept: for task {task}, the limit {least:g} accepts all responses or none, because the rewards are "
                f"between {lowest:g} and {highest:g}; set accept.least, or accept.by_task"
            )


def _filter_names(config: Config) -> list[str]:
    """Returns the names of the recipe's filters, in the order of ORDER."""
    return [name for name in ORDER if name in config.curate.filters]


def _benchmarks(config: Config) -> Benchmarks:
    """Reads the rows of the benchmarks. These rows need no task."""
    sources = config.curate.decontamination.against or config.data.eval
    if not sources:
        raise InputError("the filter decontamination has no benchmark: set curate.decontamination.against or data.eval")
    with_task = [source.model_copy(update={"task": source.task or "benchmark"}) for source in sources]
    rows = read(
        with_task,
        columns=config.data.columns,
        unique=False,
        picture_folders=config.data.picture_folders,
        check_pictures=config.data.check_pictures,
    )
    if rows.bad:
        raise InputError("\n".join(["benchmarks:", *map(str, rows.bad[:20])]))
    return Benchmarks(rows.prompts, config.curate.decontamination.ngram)


def blocks_of(plan: Plan) -> list[list[CandidateRow]]:
    """Splits the rows into blocks. If `curate.rows` is set, only this number of rows is used. These rows are spread
    evenly over the data."""
    options = plan.config.curate
    rows = [CandidateRow(prompt, source) for prompt, source in zip(plan.train, plan.sources, strict=True)]
    if options.rows is not None and options.rows < len(rows):
        rows = [rows[place * len(rows) // options.rows] for place in range(options.rows)]
    return [rows[start : start + options.block] for start in range(0, len(rows), options.block)]


def run_blocks(
    blocks: Sequence[Sequence[CandidateRow]],
    filters: Mapping[str, Filter],
    folder: CurationFolder,
    sources: Sequence[str],
    say: Say,
) -> None:
    """Applies the filters to the unfinished blocks, one block after the other. While the policy works on a block,
    judges already work on the next block."""
    judge_filters = {name: run for name, run in filters.items() if name not in POLICY_FILTERS}
    policy_filters = {name: run for name, run in filters.items() if name in POLICY_FILTERS}
    ahead: Ahead[list[Decision]] = Ahead()

    def apply(number: int, decisions: Sequence[Decision], which: Mapping[str, Filter]) -> list[Decision]:
        def say_for_block(message: str) -> None:
            ahead.check()
            say(f"block {number + 1}: {message}")

        return apply_filters(decisions, which, lambda name: Answers(folder.answers(number, name)), say_for_block)

    def judge(number: int) -> list[Decision]:
        return apply(number, [Decision(row) for row in blocks[number]], judge_filters)

    unfinished = folder.unfinished(len(blocks))
    try:
        for number, following in zip(unfinished, [*unfinished[1:], None], strict=True):
            decisions = ahead.take(number, lambda: None) if ahead.has(number) else judge(number)
            if judge_filters and policy_filters and following is not None:
                ahead.start(following, lambda n=following: judge(n))
            decisions = apply(number, decisions, policy_filters)
            folder.finish(number, decisions, sources)
            kept = sum(decision.dropped is None for decision in decisions)
            say(f"block {number + 1} of {len(blocks)} is done: {kept} of {len(decisions)} rows are kept")
    finally:
        ahead.abandon()


def _say(message: str) -> None:
    print(message, flush=True)


def apply_filters(
    decisions: Sequence[Decision], filters: Mapping[str, Filter], answers: Callable[[str], Answers], say: Say
) -> list[Decision]:
    """Applies the filters one after the other. Each filter gets the rows that are not dropped yet.

    Args:
        answers: a function that is called with the name of a filter and returns the stored answers of this filter.
    """
    result = list(decisions)
    for name, run in filters.items():
        kept = [index for index, decision in enumerate(result) if decision.dropped is None]
        start = time.monotonic()
        with answers(name) as stored:
            before = len(stored.known)
            decided = run([result[index].row for index in kept], stored)
        for index, decision in zip(kept, decided, strict=True):
            result[index] = replace(decision, filter="" if decision.dropped is None else name)
        stay = sum(decision.dropped is None for decision in decided)
        seconds = time.monotonic() - start
        say(f"{name}: {stay} of {len(kept)} rows are kept ({seconds:.0f} s, {before} answers were stored before)")
    return result


@contextmanager
def _filters(plan: Plan, benchmarks: Benchmarks | None, verbose: bool) -> Iterator[Mapping[str, Filter]]:
    """Starts the processes that the recipe's filters need. Yields the filters in the order of ORDER."""
    config, c = plan.config, plan.config.curate
    limit = config.max_invalid_fraction
    filters: dict[str, Filter] = {}
    if benchmarks:
        filters["decontamination"] = DecontaminationFilter(benchmarks)
    filters["checkability"] = CheckabilityFilter(c.checkability, plan.rewards, limit)
    filters["relevance"] = RelevanceFilter(c.relevance, plan.rewards, limit)
    with cluster(verbose=verbose), _engines(plan, verbose) as pool:
        if pool is not None:
            policy = PolicySampler(pool, plan.chat, plan.rewards, config.rollout.temperature, config.seed, limit)
            filters["difficulty"] = DifficultyFilter(c.difficulty, config.accept, policy, config.max_sequence_length)
            filters["synthesis"] = SynthesisFilter(c.synthesis, config.synthesis, config.accept, policy)
        yield {name: filters[name] for name in _filter_names(config)}


@contextmanager
def _engines(plan: Plan, verbose: bool) -> Iterator[EnginePool | None]:
    """Starts the judges that the recipe serves, and the engines. Yields the engines, or None if no filter needs
    responses of the policy."""
    config = plan.config
    policy_filters = POLICY_FILTERS & set(config.curate.filters)
    longest = config.max_sequence_length
    if "synthesis" in policy_filters:
        longest = max(longest, config.curate.synthesis.max_sequence_length)
    engines = config.rollout.workers if policy_filters else 0
    restarts = Restarts(config.max_restarts, _say)
    samplers = Samplers(plan, restarts, longest=longest, engines=engines, verbose=verbose)

    def on_outage(outage: Outage) -> None:
        if not outage.again:
            _say(f"{outage}; waiting" if outage.why else str(outage))
        if outage.why is not None:
            samplers.revive_judge(outage.endpoint)

    plan.rewards.on_outage = on_outage
    try:
        samplers.ready()
        yield samplers.pool(samplers.replace_engine) if policy_filters else None
    finally:
        samplers.close()


def _digest(plan: Plan) -> str:
    """Returns a digest of the rows and of all files that the filters use."""
    digest = hashlib.sha256()
    for prompt, source in zip(plan.train, plan.sources, strict=True):
        content = [
            prompt.id, prompt.task, prompt.messages, prompt.ground_truth, prompt.reference, prompt.meta,
            prompt.messages_pool, prompt.pool_accuracy, prompt.pool_accepted, source,
            [picture.digest for picture in prompt.images],
        ]  # fmt: skip
        digest.update(json.dumps(content, sort_keys=True).encode())
    c = plan.config.curate
    against = c.decontamination.against or plan.config.data.eval
    files = [Path(source.path) for source in against] if "decontamination" in c.filters else []
    template = synthesis_template(plan.model, plan.config.synthesis.template)
    files += [template] if "synthesis" in c.filters and template else []
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()
