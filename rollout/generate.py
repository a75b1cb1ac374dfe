"""Answers to a file of problems, by SeRe or PaCoRe: `python -m rollout.generate --model DIR IN.jsonl OUT.jsonl`.

Each line of OUT has all that was thought about one problem, and is written when it is done: the same command goes on
where it was broken off, and asks nothing twice. Exit codes are those of rl.run.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from rl.config import Source
from rl.exits import DONE, FAILED, run_command
from rl.types import Prompt
from rollout.data.errors import RowError
from rollout.data.rows import read
from rollout.pacore.client import Refused
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pacore.rounds import PacoreResult, Reply, Round, TooLong, Turns, plan_of, think
from rollout.pacore.target import ModelTarget, add_target_options, target_of

REPORT_S = 10.0  # between two lines on how far it is
BAD_REQUEST = 400


@dataclass(frozen=True)
class Settings:
    """What decides the answers, but for the problem and how the server computes; every line of OUT has it."""

    model: str
    trajectories: tuple[int, ...]  # of each round before the last; () is SeRe
    temperature: float = 1.0
    seed: int = 0
    max_tokens: int | None = None  # of one reply; None: what the context has room for
    answers: int = 1  # replies of the last round
    given: str | None = None  # the file that the first rounds are from
    wording: str | None = None  # digest of the template that shows messages; None: the default one
    weights: str | None = None  # of a model folder: what tells it from another in the same place
    max_length: int | None = None
    yarn: float | None = None

    @property
    def record(self) -> dict[str, Any]:
        return {**vars(self), "trajectories": list(self.trajectories)}


def settings_of(who: ModelTarget, template: Path | None, **others: Any) -> Settings:
    """Those of a command. Raises OSError for a template that cannot be read."""
    wording = hashlib.sha256(template.read_bytes()).hexdigest()[:16] if template else None
    return Settings(
        who.model, wording=wording, weights=who.weights(), max_length=who.max_length, yarn=who.yarn, **others
    )


def digest_of(problem: Prompt) -> str:
    """What tells a problem from another with the same id."""
    content = json.dumps([problem.messages, [picture.digest for picture in problem.images]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def turns_of(prompt: Prompt) -> Turns:
    """A row's chat in OpenAI's form, its pictures as data: URLs."""
    pictures = iter(prompt.images)

    def part(one: Mapping[str, Any]) -> Mapping[str, Any]:
        if one["type"] != "image":
            return one
        return {"type": "image_url", "image_url": {"url": next(pictures).data_url}}

    return [
        {**turn, "content": turn["content"] if isinstance(turn["content"], str) else [*map(part, turn["content"])]}
        for turn in prompt.messages
    ]


def seed_name(settings: Settings, problem: Prompt) -> str:
    """What identifies a problem in the seeds of its trajectories."""
    return f"{settings.seed}/{problem.id}"


async def generate(
    problems: Sequence[Prompt],
    settings: Settings,
    ask: Any,
    synthesis: SynthesisPrompt,
    finished: Callable[[Prompt, PacoreResult | str], None],
    *,
    given: Mapping[str, Sequence[Round]] = MappingProxyType({}),
    under_way: int = 64,
) -> None:
    """Thinks about many problems at once; `ask` has to limit its requests (rollout.pacore.client.EndpointClient does).

    A problem's synthesis begins when its own trajectories are done, and comes before trajectories that wait.

    Args:
        ask: rollout.pacore.rounds.Ask.
        finished: told of each problem when it is done: what was thought, or why there is no answer.
        under_way: problems that are thought about at a time, whose pictures are in memory.
        given: problem id -> rounds that are there already, in place of those of the settings.
    """

    places = asyncio.Semaphore(under_way)

    async def one(problem: Prompt) -> None:
        async with places:
            await answer(problem)

    async def answer(problem: Prompt) -> None:
        try:
            thought = await think(
                turns_of(problem),
                settings.trajectories,
                ask,
                synthesis,
                seed_name(settings, problem),
                answers=settings.answers,
                given=given.get(problem.id, ()),
            )
        except TooLong as error:
            finished(problem, f"the problem leaves no room for a response: {error}")
        except Refused as error:
            if error.status != BAD_REQUEST:
                raise
            finished(problem, str(error))
        else:
            finished(problem, thought)

    try:
        async with asyncio.TaskGroup() as tasks:
            for problem in problems:
                tasks.create_task(one(problem))
    except BaseExceptionGroup as group:  # one of them is told, as all mean that nothing goes on
        raise _first(group) from group


def _first(error: BaseException) -> BaseException:
    """The first of a group that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def lines_of(path: Path, whole: bytes) -> Iterator[dict[str, Any]]:
    """The records of OUT's whole lines. Raises ValueError if it is no such file."""
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):  # other ends of lines may be in texts
        try:
            record = json.loads(line)
            if not {"id", "problem", "settings"} <= record.keys():
                raise ValueError("an OUT file has id, problem and settings in every line")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a line of this program's; give another OUT file") from error
        yield record


class Answered:
    """OUT.jsonl: what is answered, and room for more.

    Raises: ValueError if it was written with other settings, or is no such file.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self._settings = path, settings.record
        self.records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a line that was broken off is asked again
        for record in lines_of(self.path, whole):
            identity, settings = record["id"], record["settings"]
            if changed := [key for key, value in self._settings.items() if settings.get(key) != value]:
                key = changed[0]
                raise ValueError(
                    f"{self.path} was begun with {key} = {settings.get(key)!r}, not {self._settings[key]!r}; give "
                    "another OUT file for this"
                )
            self.records[identity] = record  # the last of a problem's lines counts
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def left(self, problems: Sequence[Prompt]) -> list[Prompt]:
        """Those without an answer: not asked yet, asked in vain, or not the same problem as when they were asked."""
        return [problem for problem in problems if not self._has(problem)]

    def _has(self, problem: Prompt) -> bool:
        record = self.records.get(problem.id)
        return record is not None and "error" not in record and record["problem"] == digest_of(problem)

    def add(self, problem: Prompt, thought: PacoreResult | str) -> None:
        record = {
            "id": problem.id, "problem": digest_of(problem), **_record(thought), "settings": self._settings
        }  # fmt: skip
        self.records[problem.id] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _record(thought: PacoreResult | str) -> dict[str, Any]:
    if isinstance(thought, str):
        return {"error": thought}
    rounds = [
        {
            "shown": one.shown,
            "left_out": one.left_out,
            "replies": [
                {"text": r.text, "finish": r.finish, "tokens": r.tokens, "prompt_tokens": r.prompt_tokens}
                for r in one.replies
            ],
        }
        for one in thought.rounds
    ]
    return {"answer": thought.reply.message, "tokens": thought.tokens, "rounds": rounds}


def thought_of(record: Mapping[str, Any]) -> PacoreResult:
    """What a line of OUT tells. Raises ValueError for a problem without an answer."""
    if "error" in record:
        raise ValueError(f"problem {record['id']} has no answer: {record['error']}")
    return PacoreResult(
        tuple(
            Round(tuple(Reply(**reply) for reply in one["replies"]), one["shown"], one["left_out"])
            for one in record["rounds"]
        )
    )


def problems_of(path: str, limit: int | None = None) -> list[Prompt]:
    """The rows of IN, in any form that data.train has; they need no task. Raises RowError, ValueError."""
    rows = read([Source(path=path, task="problem", limit=limit)])
    if rows.bad:
        raise RowError(rows.bad)
    return list(rows.prompts)


def parser() -> argparse.ArgumentParser:
    """The command line of the contract."""
    p = argparse.ArgumentParser(
        prog="python -m rollout.generate", description="Answer problems by one chain of thought, or many in parallel."
    )
    p.add_argument("problems", metavar="IN", help="problems: JSONL, Parquet or data set; rows as for training")
    p.add_argument("out", metavar="OUT", type=Path, help="JSONL to write; one that was begun is gone on with")
    p.add_argument("--model", required=True, help="Hugging Face folder or hub id; with --url the model's name there")
    p.add_argument("--mode", choices=("sere", "pacore"), default="sere", help="one chain, or many and a synthesis")
    p.add_argument("--trajectories", default="16", metavar="PLAN", help="pacore: per round, as in 16 (default) or 32,4")
    p.add_argument(
        "--template",
        type=Path,
        help="Jinja file that shows messages; default: the model's, or ours",
    )
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-tokens", type=int, help="of one reply; default: what the context has room for")
    p.add_argument("--limit", type=int, help="only the first so many problems")
    add_target_options(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parser().parse_args(arguments)
    return run_command(
        lambda: _main(args),
        input_errors=(ValueError, FileNotFoundError),
        failures=(RuntimeError, OSError, TemplateError),
        resume=f"The same command continues from what is in {args.out}",
    )


def _main(args: argparse.Namespace) -> int:
    who = target_of(args)
    template = who.template(args.template)
    synthesis = SynthesisPrompt(template)
    settings = settings_of(
        who,
        template,
        trajectories=plan_of(args.trajectories) if args.mode == "pacore" else (),
        temperature=args.temperature,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )
    problems = problems_of(args.problems, args.limit)
    answered = Answered(args.out, settings)
    try:
        run(problems, settings, who, synthesis, answered)
    finally:
        answered.close()
    failed = answered.left(problems)
    tokens = sum(answered.records[problem.id].get("tokens", 0) for problem in problems)
    print(f"{args.out}: {len(problems) - len(failed)} answers, {tokens:,} tokens sampled")
    if failed:
        why = answered.records[failed[0].id]["error"]
        print(f"{len(failed)} without an answer; the first, {failed[0].id}: {why}", file=sys.stderr)
        print("The same command asks them again", file=sys.stderr)
    return FAILED if failed else DONE


def run(
    problems: Sequence[Prompt],
    settings: Settings,
    who: ModelTarget,
    synthesis: SynthesisPrompt,
    answered: Answered,
    *,
    given: Mapping[str, Sequence[Round]] = MappingProxyType({}),
) -> None:
    """Answers what is not answered yet; see `generate`."""
    left = answered.left(problems)
    trajectories = max(settings.trajectories, default=settings.answers)
    under_way = max(2, 2 * who.concurrency // max(1, trajectories))
    if len(left) < len(problems):
        print(f"{len(problems) - len(left)} of {len(problems)} problems are answered already", file=sys.stderr)
    if not left:
        return
    started, told, done = time.monotonic(), time.monotonic(), 0

    def finished(problem: Prompt, thought: PacoreResult | str) -> None:
        nonlocal told, done
        answered.add(problem, thought)
        done += 1
        if time.monotonic() - told > REPORT_S or done == len(left):
            told = time.monotonic()
            print(f"{done} of {len(left)} problems, {told - started:.0f} s", file=sys.stderr, flush=True)

    fields: dict[str, Any] = {"temperature": settings.temperature}
    if settings.max_tokens:
        fields["max_tokens"] = settings.max_tokens

    async def work(url: str) -> None:
        async with who.upstream(url, fields) as upstream:
            await generate(left, settings, upstream, synthesis, finished, given=given, under_way=under_way)

    with who.served() as url:
        asyncio.run(work(url))


if __name__ == "__main__":
    sys.exit(main())
