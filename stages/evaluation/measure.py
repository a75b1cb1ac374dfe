"""Measures a policy on held-out rows: samples answers, scores them, and reports the figures of scores.py."""

import os
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
from rollout.data.rows import RowError, read
from rollout.generate import Answered, Settings, digest_of, lines_of, run, seed_name, settings_of, thought_of
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pacore.rounds import PacoreResult, Round, order
from rollout.pacore.target import ModelTarget
from rollout.vllm.server import Server
from stages.evaluation.scores import Judged, result_rows
from stages.loop import enough_valid
from stages.pacore import accepted, synthesis_metrics
from stages.plan import check_accept, check_judges, limited, reward_runner, served_here
from stages.rlhf import penalty_metrics, preference_metrics


@dataclass(frozen=True)
class Questions:
    """What an evaluation asks."""

    modes: Sequence[str]
    attempts: int = 16  # chains of thought per row
    syntheses: int = 1  # times that PaCoRe answers from them
    limit: int | None = None  # rows of each task; None: as many as data.eval_limit says
    seed: int = 0
    cache: Path | None = None  # keeps what the model says, for the same questions asked again
    trajectories: Path | None = None  # whose first rounds are used
    blind: bool = False  # whether the policy sees pictures of other rows
    tasks: Collection[str] | None = None  # whose rows; None: all


def measure(config: Config, who: ModelTarget, asked: Questions) -> "Report":
    """How good a policy is on the recipe's held-out rows. Raises ValueError (of several kinds) for what does not fit,
    and what serving and scoring raise."""
    check_accept(config)
    prompts = [p for p in _rows(config, asked.limit) if asked.tasks is None or p.task in asked.tasks]
    tasks = {prompt.task for prompt in prompts}  # the others' judges need not be there
    rewards = reward_runner(config.model_copy(update={"rewards": {task: config.rewards[task] for task in tasks}}))
    check_judges(config, rewards)
    posed = prompts
    if asked.blind:
        prompts = [prompt for prompt in prompts if prompt.images]
        posed = blinded(prompts)
    given = _given(asked.trajectories, posed) if asked.trajectories else {}
    who = replace(who, options=_options(config) | dict(who.options or {}))
    template = who.template(config.synthesis.template)
    settings = settings_of(
        who,
        template,
        trajectories=() if given else (asked.attempts,),
        temperature=config.rollout.temperature,
        seed=asked.seed,
        answers=asked.syntheses if "pacore" in asked.modes else 0,
        given=str(asked.trajectories) if asked.trajectories else None,
    )
    with ExitStack() as stack:
        cache = asked.cache or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cache.jsonl"
        answered = Answered(cache, settings)
        stack.callback(answered.close)
        if settings.answers or not given:
            run(posed, settings, who, SynthesisPrompt(template), answered, given=given)
            failed = answered.left(posed)
            thoughts = {p.id: thought_of(answered.records[p.id]) for p in posed if p not in failed}
        else:
            thoughts = {p.id: PacoreResult(given[p.id]) for p in prompts}
    with _judges(config, rewards, who.device):
        rows = judged(config, rewards, [p for p in prompts if p.id in thoughts], thoughts, settings)
    return Report(config, asked.modes, rows, len(prompts) - len(rows), rewards.penalties(), asked.blind)


@contextmanager
def _judges(config: Config, rewards: RewardRunner, device: str) -> Iterator[None]:
    """Serves the judges without a url here, once the policy is served no more. Raises RuntimeError if one cannot be."""
    with ExitStack() as stack:
        servers = {}
        for name, judge in served_here(config, rewards).items():
            servers[name] = Server(
                judge.model,
                host="127.0.0.1",
                device="cuda" if device == "cuda" else "cpu",
                options=judge.serve,
                threads=os.cpu_count() or 1,
            )
            stack.callback(servers[name].close)

        def heard(outage: Outage) -> None:
            if outage.endpoint in servers and not servers[outage.endpoint].runs():
                raise RuntimeError(f"judge {outage.endpoint}, which was served here, has died: {outage.why}")
            if not outage.again:
                print(f"endpoint {outage.endpoint}: {outage.why or 'is back'}", file=sys.stderr)

        rewards.on_outage = heard
        rewards.set_urls({name: server.url() for name, server in servers.items()})
        yield


def _rows(config: Config, limit: int | None) -> list[Prompt]:
    """The held-out rows. Raises RowError for rows that cannot be used."""
    data = config.data
    if not data.eval:
        raise InputError("there are no rows to evaluate on; name a file with --data")
    rows = read(data.eval, columns=data.columns, tasks=config.rewards.keys(), problem=reward_runner(config).problem)
    if rows.bad and (data.on_bad_row == "stop" or not rows.prompts):
        raise RowError(rows.bad)
    return limited(rows.prompts, limit or data.eval_limit)


def blinded(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every row with the pictures of another: the next one of its task that shows as many, and not the same.

    Raises: InputError if there is none, or no row at all; rows without pictures are not to be given.
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
                f"--blind: no other row of task {prompt.task} has {len(seen)} pictures to show in place of those of "
                f"row {prompt.id}"
            )
        found.append(replace(prompt, images=images))
    return found


def _options(config: Config) -> dict[str, str | bool]:
    """How a recipe's policy computes, as arguments of vLLM's server."""
    template = config.model.chat_template
    return {"dtype": config.model.dtype, **({"chat-template": str(template)} if template else {})}


def _given(path: Path, prompts: Sequence[Prompt]) -> dict[str, tuple[Round, ...]]:
    """The first rounds that a file holds. Raises ValueError if it lacks one of the rows, or is about other problems."""
    rounds: dict[str, tuple[Round, ...]] = {}
    problems = {prompt.id: digest_of(prompt) for prompt in prompts}
    data = path.read_bytes()
    for record in lines_of(path, data[: data.rfind(b"\n") + 1]):
        if "error" in record or record["id"] not in problems:
            continue
        if record["problem"] != problems[record["id"]]:
            raise InputError(f"{path}: row {record['id']} was another problem when it was asked")
        rounds[record["id"]] = thought_of(record).rounds[:1]
    if missing := [p.id for p in prompts if p.id not in rounds]:
        raise InputError(f"{path} has no trajectories of row {missing[0]} ({len(missing)} rows are missing)")
    return rounds


def judged(
    config: Config,
    rewards: RewardRunner,
    prompts: Sequence[Prompt],
    thoughts: Mapping[str, PacoreResult],
    settings: Settings,
) -> list[Judged]:
    """Every reply scored; without rows that are left with no valid score. Raises Stop if rewards fail too often."""
    with rewards:
        first = _scored(config, rewards, prompts, thoughts, 0)
        last = _scored(config, rewards, prompts, thoughts, -1) if settings.answers else {}
    found = []
    for prompt in prompts:
        thought, attempts = thoughts[prompt.id], first[prompt.id]
        answers = _with_shown(prompt, thought, attempts, last[prompt.id], config, settings) if last else []
        valid = [[s for s in some if s.invalid is None] for some in (attempts, answers)]
        if valid[0] and (valid[1] or not last):
            found.append(Judged(prompt, thought, *valid))
    if not found:
        raise Stop("not one row was answered and scored, so there is nothing to report", saves=False)
    return found


def _scored(
    config: Config, rewards: RewardRunner, prompts: Sequence[Prompt], thoughts: Mapping[str, PacoreResult], which: int
) -> dict[str, list[Scored]]:
    """The replies of every row's round number `which`. Apart from other rounds: rewards may see a row's as a group."""
    asked = [
        Rollout(prompt, reply.text, reply.finish)
        for prompt in prompts
        for reply in thoughts[prompt.id].rounds[which].replies
    ]
    scored = iter(enough_valid(rewards.score(asked), config.max_invalid_fraction))
    return {p.id: [next(scored) for _ in thoughts[p.id].rounds[which].replies] for p in prompts}


def _with_shown(
    prompt: Prompt,
    thought: PacoreResult,
    attempts: Sequence[Scored],
    answers: Sequence[Scored],
    config: Config,
    settings: Settings,
) -> list[Scored]:
    """The scored syntheses, whose prompts say which messages they saw."""
    before, last = thought.rounds
    right = [accepted(s, config.accept) for s, r in zip(attempts, before.replies, strict=True) if r.message]
    found = []
    for number, scored in enumerate(answers):
        places = order(len(before.messages), last.shown, f"{seed_name(settings, prompt)}/1/{number}")
        shown = PooledAnswers(tuple(before.messages[n] for n in places), tuple(right[n] for n in places))
        found.append(replace(scored, rollout=replace(scored.rollout, prompt=replace(prompt, shown=shown))))
    return found


@dataclass(frozen=True)
class Report:
    """What an evaluation tells."""

    config: Config
    modes: Sequence[str]
    rows: Sequence[Judged]
    left_out: int = 0  # rows without an answer or a valid score
    penalties: Collection[str] = ()  # names of the recipe's, as in `Scored.parts`
    blind: bool = False  # whether the policy saw other rows' pictures

    def synthesis(self) -> dict[str, float]:
        """pacore/* metrics (rl/record/metrics.py) of the syntheses."""
        return synthesis_metrics([s for row in self.rows for s in row.answers], self.config.accept)

    def preference(self) -> dict[str, float]:
        """genrm/* and penalty/* metrics of the attempts, for tasks whose judge compares with a teacher."""
        attempts = [s for row in self.rows for s in row.attempts]
        return preference_metrics(attempts) | penalty_metrics(attempts, self.penalties)

    def json(self) -> dict[str, Any]:
        return {
            "rows": len(self.rows),
            "left_out": self.left_out,
            "blind": self.blind,
            "results": [
                {
                    "task": line.task,
                    "mode": line.name,
                    "accuracy": vars(line.accuracy),
                    "reward": line.reward and vars(line.reward),
                    "tokens": line.tokens,
                }
                for line in result_rows(self.rows, self.config, self.modes)
            ],
            "synthesis": self.synthesis(),
            "preference": self.preference(),
        }

    def show(self) -> None:
        """A table, and how syntheses relate to what they saw."""
        whose = ", with pictures of other rows" if self.blind else ""
        table = Table(title=f"{len(self.rows)} rows{whose}; 95% confidence intervals over rows")
        for name in ("task", "mode", "accuracy", "mean reward", "tokens per row"):
            table.add_column(name, justify="left" if name in ("task", "mode") else "right")
        for line in result_rows(self.rows, self.config, self.modes):
            reward = str(line.reward) if line.reward else ""
            table.add_row(line.task, line.name, str(line.accuracy), reward, f"{line.tokens:,.0f}")
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(table)
        if self.left_out:
            console.print(f"{self.left_out} rows are left out: they have no answer, or no valid score")
        for name, value in (self.synthesis() | self.preference()).items():
            console.print(f"{name:32} {value:.3f}")
