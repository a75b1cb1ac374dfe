"""Measures a policy on held-out rows: samples answers, scores them, and reports the figures that scores.py computes."""

import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rewards.running.async_pool import Outage
from rewards.running.runner import RewardRunner
from rl.config import Config
from rl.exits import InputError
from rl.stop import Stop
from rl.types import PooledAnswers, Prompt, Rollout, Scored
from rollout.data.rows import read
from rollout.generate import (
    AnswerFile,
    Settings,
    make_settings,
    parse_record,
    problem_digest,
    read_records,
    run,
    seed_name,
)
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pacore.rounds import PacoreResult, Round, draw_order
from rollout.pacore.target import ModelTarget
from rollout.vllm.server import KEY_ENV, serving
from stages.evaluation.scores import EvaluatedRow, result_rows
from stages.loop import require_valid
from stages.pacore import is_accepted, synthesis_metrics
from stages.plan import check_accept, check_judges, limited, reward_runner, served_here
from stages.rlhf import penalty_metrics, preference_metrics

MODES = ("sere", "majority", "pacore")


@dataclass(frozen=True)
class Questions:
    """The settings of an evaluation: which kinds of answers are sampled, how many of each kind, and for which rows."""

    modes: Sequence[str]  # names from MODES
    attempts: int = 16  # trajectories per row
    syntheses: int = 1  # PaCoRe answers per row; each answer uses all trajectories
    limit: int | None = None  # maximum rows per task; None means data.eval_limit
    seed: int = 0
    cache: Path | None = None  # file that stores the answers; a repeated evaluation reuses them
    trajectories: Path | None = None  # cache file of an earlier evaluation; its first rounds are used again
    blind: bool = False  # True: each row gets the pictures of another row
    tasks: Collection[str] | None = None  # the tasks to measure; None means all tasks


def measure(config: Config, target: ModelTarget, questions: Questions) -> "EvaluationReport":
    """Measures a policy on the recipe's held-out rows.

    Args:
        target: the policy, which vLLM serves.
    Raises: ValueError or a subclass if the input is wrong. Errors of the model's server and errors of the scoring are
        also raised.
    """
    check_accept(config)
    prompts = [
        p for p in _rows(config, target, questions.limit) if questions.tasks is None or p.task in questions.tasks
    ]
    tasks = {prompt.task for prompt in prompts}  # judges that only other tasks use are not started
    rewards = reward_runner(config.model_copy(update={"rewards": {task: config.rewards[task] for task in tasks}}))
    check_judges(config, rewards)
    posed = prompts
    if questions.blind:
        prompts = [prompt for prompt in prompts if prompt.images]
        posed = blinded(prompts)
    first_rounds = _first_rounds(questions.trajectories, posed) if questions.trajectories else {}
    target = replace(target, options=_options(config) | dict(target.options or {}))
    template = target.synthesis_template(config.synthesis.template)
    settings = make_settings(
        target,
        template,
        trajectories=() if first_rounds else (questions.attempts,),
        temperature=config.rollout.temperature,
        seed=questions.seed,
        answers=questions.syntheses if "pacore" in questions.modes else 0,
        given=str(questions.trajectories) if questions.trajectories else None,
    )
    with ExitStack() as stack:
        cache = questions.cache or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cache.jsonl"
        answered = AnswerFile(cache, settings)
        stack.callback(answered.close)
        if settings.answers or not first_rounds:
            run(posed, settings, target, SynthesisPrompt(template), answered, first_rounds=first_rounds)
            failed = answered.unanswered(posed)
            results = {p.id: parse_record(answered.records[p.id]) for p in posed if p not in failed}
        else:
            results = {p.id: PacoreResult(first_rounds[p.id]) for p in prompts}
    with _judges(config, rewards, target.device):
        rows = score_results(config, rewards, [p for p in prompts if p.id in results], results, settings)
    return EvaluationReport(
        config, questions.modes, rows, len(prompts) - len(rows), rewards.penalties(), questions.blind
    )


@contextmanager
def _judges(config: Config, rewards: RewardRunner, device: str) -> Iterator[None]:
    """Starts a server on this machine for each judge without a url. Raises RuntimeError if a judge cannot be served."""
    with ExitStack() as stack:
        judges = served_here(config, rewards).items()
        servers = {name: stack.enter_context(serving(judge.model, device, judge.serve)) for name, judge in judges}

        def on_outage(outage: Outage) -> None:
            if outage.endpoint in servers and not servers[outage.endpoint].runs():
                raise RuntimeError(f"judge {outage.endpoint}, which this evaluation served, has died: {outage.why}")
            if not outage.again:
                print(outage, file=sys.stderr)

        rewards.on_outage = on_outage
        rewards.set_urls({name: server.url() for name, server in servers.items()}, KEY_ENV)
        yield


def _rows(config: Config, target: ModelTarget, limit: int | None) -> list[Prompt]:
    """Returns the held-out rows. Raises RowError if some rows cannot be used."""
    data = config.data
    if not data.eval:
        raise InputError("there are no rows to evaluate on; give a file with --data")
    rows = read(
        data.eval,
        columns=data.columns,
        tasks=config.rewards.keys(),
        problem=reward_runner(config).problem,
        picture_folders=data.picture_folders,
        check_pictures=data.check_pictures,
        shown=target.shown_size(),
    )
    return limited(rows.checked(data.on_bad_row).prompts, limit or data.eval_limit)


def blinded(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Replaces the pictures of each row with the pictures of another row: the next row that has the same task and the
    same number of pictures, but other pictures.

    Args:
        prompts: rows with pictures.
    Raises: InputError if `prompts` is empty, or if no pictures are found for one of the rows.
    """
    if not prompts:
        raise InputError("--blind: no row has a picture")
    found = []
    for number, prompt in enumerate(prompts):
        around = (*prompts[number + 1 :], *prompts[:number])
        seen = [picture.digest for picture in prompt.images]
        others = (
            other.images
            for other in around
            if (other.task, len(other.images)) == (prompt.task, len(seen))
            and [picture.digest for picture in other.images] != seen
        )
        if (images := next(others, None)) is None:
            raise InputError(
                f"--blind: no other row of task {prompt.task} has {len(seen)} pictures that can replace the pictures "
                f"of row {prompt.id}"
            )
        found.append(replace(prompt, images=images))
    return found


def _options(config: Config) -> dict[str, str | bool]:
    """Returns the arguments of vLLM's server for the policy, made from the recipe's options."""
    template = config.model.chat_template
    return {"dtype": config.model.dtype, **({"chat-template": str(template)} if template else {})}


def _first_rounds(path: Path, prompts: Sequence[Prompt]) -> dict[str, tuple[Round, ...]]:
    """Reads the first round of each row from a file, and returns row id -> first round. Raises InputError if a row is
    missing in the file, or has changed since the file was written."""
    rounds: dict[str, tuple[Round, ...]] = {}
    problems = {prompt.id: problem_digest(prompt) for prompt in prompts}
    data = path.read_bytes()
    for record in read_records(path, data[: data.rfind(b"\n") + 1]):
        if "error" in record or record["id"] not in problems:
            continue
        if record["problem"] != problems[record["id"]]:
            raise InputError(f"{path}: the problem of row {record['id']} has changed since this file was written")
        rounds[record["id"]] = parse_record(record).rounds[:1]
    if missing := [p.id for p in prompts if p.id not in rounds]:
        raise InputError(f"{path} has no trajectories of row {missing[0]} ({len(missing)} rows are missing)")
    return rounds


def score_results(
    config: Config,
    rewards: RewardRunner,
    prompts: Sequence[Prompt],
    results: Mapping[str, PacoreResult],
    settings: Settings,
) -> list[EvaluatedRow]:
    """Scores every reply. A row is left out if none of its attempts has a valid score. With PaCoRe, a row is also left
    out if none of its syntheses has a valid score. Raises Stop if too many scores are invalid, or if no row remains.

    Args:
        results: row id -> the model's answers.
    """
    with rewards:
        first = _score_round(config, rewards, prompts, results, 0)
        last = _score_round(config, rewards, prompts, results, -1) if settings.answers else {}
    rows = []
    for prompt in prompts:
        result, attempts = results[prompt.id], first[prompt.id]
        syntheses = _with_shown(prompt, result, attempts, last[prompt.id], config, settings) if last else []
        valid = [[s for s in scored if s.invalid is None] for scored in (attempts, syntheses)]
        if valid[0] and (valid[1] or not last):
            rows.append(EvaluatedRow(prompt, result, *valid))
    if not rows:
        raise Stop("no row has both an answer and a valid score, so there is nothing to report", saves=False)
    return rows


def _score_round(
    config: Config, rewards: RewardRunner, prompts: Sequence[Prompt], results: Mapping[str, PacoreResult], which: int
) -> dict[str, list[Scored]]:
    """Scores the replies of the round with the index `which`, and returns row id -> scored replies. Each round is
    scored in a separate call, because a group reward treats all replies to a row in one call as one group."""
    rollouts = [
        Rollout(prompt, reply.text, reply.finish)
        for prompt in prompts
        for reply in results[prompt.id].rounds[which].replies
    ]
    scored = iter(require_valid(rewards.score(rollouts), config.max_invalid_fraction))
    return {p.id: [next(scored) for _ in results[p.id].rounds[which].replies] for p in prompts}


def _with_shown(
    prompt: Prompt,
    result: PacoreResult,
    attempts: Sequence[Scored],
    syntheses: Sequence[Scored],
    config: Config,
    settings: Settings,
) -> list[Scored]:
    """Returns the scored syntheses with the prompts from which they were sampled. Before, each synthesis has only the
    row's prompt; this function adds the pooled answers that the synthesis saw."""
    before, last = result.rounds
    correct = [is_accepted(s, config.accept) for s, r in zip(attempts, before.replies, strict=True) if r.message]
    found = []
    for number, scored in enumerate(syntheses):
        places = draw_order(len(before.messages), last.shown, f"{seed_name(settings, prompt)}/1/{number}")
        shown = PooledAnswers(tuple(before.messages[n] for n in places), tuple(correct[n] for n in places))
        found.append(replace(scored, rollout=replace(scored.rollout, prompt=replace(prompt, shown=shown))))
    return found


@dataclass(frozen=True)
class EvaluationReport:
    """The results of an evaluation."""

    config: Config
    modes: Sequence[str]
    rows: Sequence[EvaluatedRow]
    left_out: int = 0  # number of rows without an answer or without a valid score
    penalties: Collection[str] = ()  # names of the recipe's penalties, spelled as in `Scored.parts`
    blind: bool = False  # True: each row had the pictures of another row

    def synthesis(self) -> dict[str, float]:
        """Returns the pacore/* metrics (rl/record/metrics.yaml) of the syntheses."""
        return synthesis_metrics([s for row in self.rows for s in row.syntheses], self.config.accept)

    def preference(self) -> dict[str, float]:
        """Returns the penalty/* metrics of the attempts, and also the genrm/* metrics if a judge has compared
        answers."""
        attempts = [s for row in self.rows for s in row.attempts]
        return preference_metrics(attempts) | penalty_metrics(attempts, self.penalties)

    def json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "rows": len(self.rows),
            "left_out": self.left_out,
            "blind": self.blind,
            "results": [
                {
                    "task": row.task,
                    "mode": row.name,
                    "accuracy": vars(row.accuracy),
                    "reward": row.reward and vars(row.reward),
                    "tokens": row.tokens,
                }
                for row in result_rows(self.rows, self.config, self.modes)
            ],
            "synthesis": self.synthesis(),
            "preference": self.preference(),
        }

    def show(self) -> None:
        """Prints the table of results, and then the metrics pacore/*, genrm/* and penalty/*."""
        whose = ", with pictures of other rows" if self.blind else ""
        table = Table(title=f"{len(self.rows)} rows{whose}; 95% confidence intervals over rows")
        for name in ("task", "mode", "accuracy", "mean reward", "tokens per row"):
            table.add_column(name, justify="left" if name in ("task", "mode") else "right")
        for row in result_rows(self.rows, self.config, self.modes):
            reward = str(row.reward) if row.reward else ""
            table.add_row(row.task, row.name, str(row.accuracy), reward, f"{row.tokens:,.0f}")
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(table)
        if self.left_out:
            console.print(f"{self.left_out} rows are left out: they have no answer, or no valid score")
        for name, value in (self.synthesis() | self.preference()).items():
            console.print(f"{name:32} {value:.3f}")
