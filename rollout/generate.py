"""Answers the problems in a file with SeRe or PaCoRe: `python -m rollout.generate --model DIR IN.jsonl OUT.jsonl`.

Each line of OUT has all rounds of one problem. A line is written as soon as its problem is answered. After an
interruption, the same command continues and answers no problem twice. Exit codes are in rl/exits.py.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from rl.config import Source
from rl.exits import DONE, FAILED, add_stop_option, run_command
from rl.interrupt import run_async
from rl.record.disk import hold_file
from rl.types import BadPicture, LostPicture, Prompt
from rollout.data.rows import read
from rollout.pacore.client import NoAnswer, RequestRefused
from rollout.pacore.prompt import Chat, SynthesisPrompt
from rollout.pacore.rounds import PacoreResult, PromptTooLong, Reply, Round, Sampler, parse_plan, run_rounds
from rollout.pacore.target import ModelTarget, add_target_options, target_of

REPORT_S = 10.0  # minimum seconds between two lines of progress


@dataclass(frozen=True)
class Settings:
    """The options that the answers depend on. Every line of OUT contains these fields, with the same names."""

    model: str
    trajectories: tuple[int, ...]  # number of trajectories in each round before the last round; () is SeRe
    temperature: float = 1.0
    seed: int = 0
    max_tokens: int | None = None  # maximum tokens of one reply; None means that only the context limits a reply
    answers: int = 1  # number of replies in the last round
    given: str | None = None  # file of an earlier evaluation; the first rounds in this file are used again
    wording: str | None = None  # digest of the synthesis template; None means the default template
    weights: str | None = None  # digest of the weight files, from ModelTarget.weights_digest
    max_length: int | None = None
    yarn: float | None = None

    @property
    def record(self) -> dict[str, Any]:
        return {**vars(self), "trajectories": list(self.trajectories)}


def make_settings(target: ModelTarget, template: Path | None, **others: Any) -> Settings:
    """Returns the settings for a model and a synthesis template. Raises OSError if the template cannot be read."""
    wording = hashlib.sha256(template.read_bytes()).hexdigest()[:16] if template else None
    return Settings(
        target.model,
        wording=wording,
        weights=target.weights_digest(),
        max_length=target.max_length,
        yarn=target.yarn,
        **others,
    )


def problem_digest(problem: Prompt) -> str:
    """Returns a digest of the problem's messages and pictures. Two problems with the same id are the same problem if
    their digests are equal."""
    content = json.dumps([problem.messages, [picture.digest for picture in problem.images]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def openai_chat(prompt: Prompt) -> Chat:
    """Returns a row's chat in the format of OpenAI's API, with pictures as data: URLs."""
    pictures = iter(prompt.images)

    def openai_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return part
        return {"type": "image_url", "image_url": {"url": next(pictures).data_url}}

    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [*map(openai_part, m["content"])]}
        for m in prompt.messages
    ]


def seed_name(settings: Settings, problem: Prompt) -> str:
    """Returns the text from which the seeds of a problem's trajectories are derived."""
    return f"{settings.seed}/{problem.id}"


async def generate(
    problems: Sequence[Prompt],
    settings: Settings,
    sample: Sampler,
    synthesis: SynthesisPrompt,
    on_result: Callable[[Prompt, PacoreResult | str], None],
    *,
    first_rounds: Mapping[str, Sequence[Round]] = MappingProxyType({}),
    under_way: int = 64,
) -> None:
    """Answers many problems in parallel.

    The synthesis of a problem starts when all trajectories of this problem are done. The request for the synthesis is
    sent before all waiting requests for trajectories of other problems.

    Args:
        sample: sends the requests. It must limit the number of simultaneous requests, as EndpointClient does.
        on_result: is called once per problem with the problem's rounds, or with the reason why there is no answer.
        first_rounds: problem id -> rounds from an earlier run. They are used in place of the rounds that
            `settings.trajectories` describes.
        under_way: maximum number of problems that are answered at the same time. The pictures of these problems are in
            memory.
    """

    semaphore = asyncio.Semaphore(under_way)

    async def answer(problem: Prompt) -> None:
        async with semaphore:
            on_result(problem, await result(problem))

    async def result(problem: Prompt) -> PacoreResult | str:
        try:
            chat = openai_chat(problem)
        except (BadPicture, LostPicture, OSError) as error:
            return f"a picture cannot be read: {error}"
        try:
            return await run_rounds(
                chat,
                settings.trajectories,
                sample,
                synthesis,
                seed_name(settings, problem),
                answers=settings.answers,
                first_rounds=first_rounds.get(problem.id, ()),
            )
        except PromptTooLong as error:
            return f"the problem leaves no room for a response: {error}"
        except NoAnswer as error:
            return str(error)
        except RequestRefused as error:
            if not error.only_this:
                raise
            return str(error)

    try:
        async with asyncio.TaskGroup() as tasks:
            for problem in problems:
                tasks.create_task(answer(problem))
    except BaseExceptionGroup as group:  # the message shows only the first error
        raise _first_error(group) from group


def _first_error(error: BaseException) -> BaseException:
    """Returns the first error in a group of errors. The group may contain other groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def read_records(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    """Parses the complete lines of an OUT file. Raises ValueError if a line is not from an OUT file."""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # splitlines() also splits inside texts
        try:
            record = json.loads(line)
            if not {"id", "problem", "settings"} <= record.keys():
                raise ValueError("an OUT file has id, problem and settings in every line")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number} was not written by this command; give another OUT file") from error
        yield record


OWN_LINE = re.compile(rb'\{"id": "(?:[^"\\]|\\.)*", "problem": "')  # the first characters of a record


class AnswerFile:
    """Reads the results in an OUT file, and appends new results.

    Raises: ValueError if the file was written with other settings or by another program.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self._settings = path, settings.record
        self.records: dict[str, dict[str, Any]] = {}  # problem id -> record
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
        self._file = hold_file(file, f"another command is writing to {path}; end it first, or give another OUT file")
        try:
            self._read()
        except ValueError:
            self.close()
            raise

    def _read(self) -> None:
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]  # a problem whose line is incomplete is answered again
        if data and not complete and not OWN_LINE.match(data):
            raise ValueError(f"the last line of {self.path} was not written by this command; give another OUT file")
        for record in read_records(self.path, complete):
            settings = record["settings"]
            if changed := [key for key, value in self._settings.items() if settings.get(key) != value]:
                key = changed[0]
                raise ValueError(
                    f"{self.path} was started with {key} = {settings.get(key)!r}, not {self._settings[key]!r}; give "
                    "another OUT file"
                )
            self.records[record["id"]] = record  # if a problem has several lines, the last line counts
        if len(complete) < len(data):
            os.truncate(self.path, len(complete))

    def unanswered(self, problems: Sequence[Prompt]) -> list[Prompt]:
        """Returns the problems that have no answer. There are three cases: no record has the problem's id, the record
        with this id contains an error, or the record with this id belongs to another problem."""
        return [problem for problem in problems if not self._has_answer(problem)]

    def _has_answer(self, problem: Prompt) -> bool:
        record = self.records.get(problem.id)
        return record is not None and "error" not in record and record["problem"] == problem_digest(problem)

    def add(self, problem: Prompt, result: PacoreResult | str) -> None:
        """Appends the result of a problem: the rounds, or the reason why the problem has no answer."""
        record = {
            "id": problem.id, "problem": problem_digest(problem), **_record(result), "settings": self._settings
        }  # fmt: skip
        self.records[problem.id] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _record(result: PacoreResult | str) -> dict[str, Any]:
    if isinstance(result, str):
        return {"error": result}
    rounds = [
        {
            "shown": one_round.shown,
            "left_out": one_round.left_out,
            "replies": [
                {"text": r.text, "finish": r.finish, "tokens": r.tokens, "prompt_tokens": r.prompt_tokens}
                for r in one_round.replies
            ],
        }
        for one_round in result.rounds
    ]
    return {"answer": result.reply.message, "tokens": result.tokens, "rounds": rounds}


def parse_record(record: Mapping[str, Any]) -> PacoreResult:
    """Returns the rounds in a record of an OUT file. Raises ValueError if the problem has no answer."""
    if "error" in record:
        raise ValueError(f"problem {record['id']} has no answer: {record['error']}")
    return PacoreResult(
        tuple(
            Round(tuple(Reply(**reply) for reply in fields["replies"]), fields["shown"], fields["left_out"])
            for fields in record["rounds"]
        )
    )


def read_problems(path: str, limit: int | None = None, picture_folders: Sequence[str] = ()) -> list[Prompt]:
    """Reads the rows of IN. IN may be any source that data.train accepts, and its rows need no task. Raises RowError,
    ValueError."""
    source = Source(path=path, task="problem", limit=limit)
    return list(read([source], picture_folders=picture_folders).checked().prompts)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m rollout.generate",
        description="Answers problems with SeRe (one trajectory) or PaCoRe (many trajectories, then a synthesis).",
    )
    p.add_argument("problems", metavar="IN", help="JSONL, Parquet or data set with the problems (as for data.train)")
    p.add_argument("out", metavar="OUT", type=Path, help="JSONL file to write, or to continue")
    p.add_argument("--model", required=True, help="Hugging Face folder or hub id; with --url: its name at the endpoint")
    p.add_argument("--mode", choices=("sere", "pacore"), default="sere", help="one trajectory, or many and a synthesis")
    p.add_argument("--trajectories", default="16", metavar="PLAN", help="trajectories per round, e.g. 32,4; default 16")
    p.add_argument(
        "--template", type=Path, help="Jinja file of the synthesis prompt; default: the file in the model's folder"
    )
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-tokens", type=int, help="maximum tokens of a reply; default: only the context limits a reply")
    p.add_argument("--limit", type=int, help="answer only the first LIMIT problems")
    p.add_argument(
        "--picture-folder", action="append", default=[], metavar="DIR",
        help="one more folder in which pictures of IN may be; default: only the folder of IN",
    )  # fmt: skip
    add_target_options(p)
    add_stop_option(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_args(arguments)
    return run_command(
        lambda: _main(args),
        input_errors=(ValueError, FileNotFoundError),
        failures=(RuntimeError, OSError, TemplateError),
        stop_signal=args.stop_signal,
        resume=f"The same command continues from the results in {args.out}",
    )


def _main(args: argparse.Namespace) -> int:
    target = target_of(args)
    template = target.synthesis_template(args.template)
    synthesis = SynthesisPrompt(template)
    settings = make_settings(
        target,
        template,
        trajectories=parse_plan(args.trajectories) if args.mode == "pacore" else (),
        temperature=args.temperature,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )
    problems = read_problems(args.problems, args.limit, args.picture_folder)
    answers = AnswerFile(args.out, settings)
    try:
        run(problems, settings, target, synthesis, answers)
    finally:
        answers.close()
    failed = answers.unanswered(problems)
    tokens = sum(answers.records[problem.id].get("tokens", 0) for problem in problems)
    print(f"{args.out}: {len(problems) - len(failed)} answers, {tokens:,} tokens sampled")
    if failed:
        reason = answers.records[failed[0].id]["error"]
        print(f"{len(failed)} problems have no answer; the first is {failed[0].id}: {reason}", file=sys.stderr)
        print("Run the same command again to answer these problems", file=sys.stderr)
    return FAILED if failed else DONE


def run(
    problems: Sequence[Prompt],
    settings: Settings,
    target: ModelTarget,
    synthesis: SynthesisPrompt,
    answers: AnswerFile,
    *,
    first_rounds: Mapping[str, Sequence[Round]] = MappingProxyType({}),
) -> None:
    """Calls `generate` for the problems that have no answer in the file yet."""
    unanswered = answers.unanswered(problems)
    trajectories = max(settings.trajectories, default=settings.answers)
    under_way = max(2, 2 * target.concurrency // max(1, trajectories))
    if len(unanswered) < len(problems):
        answered = len(problems) - len(unanswered)
        print(f"{answered} of {len(problems)} problems are answered already", file=sys.stderr)
    if not unanswered:
        return
    started, reported, done = time.monotonic(), time.monotonic(), 0

    def on_result(problem: Prompt, result: PacoreResult | str) -> None:
        nonlocal reported, done
        answers.add(problem, result)
        done += 1
        if time.monotonic() - reported > REPORT_S or done == len(unanswered):
            reported = time.monotonic()
            print(f"{done} of {len(unanswered)} problems done, {reported - started:.0f} s", file=sys.stderr, flush=True)

    fields: dict[str, Any] = {"temperature": settings.temperature}
    if settings.max_tokens:
        fields["max_tokens"] = settings.max_tokens

    async def work(url: str) -> None:
        async with target.client(url, fields) as client:
            await generate(
                unanswered, settings, client, synthesis, on_result, first_rounds=first_rounds, under_way=under_way
            )

    with target.serve() as url:
        run_async(work(url))


if __name__ == "__main__":
    sys.exit(main())
