"""Scripted engines, judges and rows, for tests of the curation."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rl.config import Accept, Checkability, Difficulty, SynthesisFilterOptions, SynthesisOptions
from rl.types import Completion, Picture, Prompt, Request, Rollout, RowScore, Scored
from rollout.data.decontamination import Benchmarks
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pool import seed_of
from stages.curation.answers import Answers
from stages.curation.filters import (
    CandidateRow,
    CheckabilityFilter,
    Decision,
    DecontaminationFilter,
    DifficultyFilter,
    Filter,
    SynthesisFilter,
)
from stages.curation.sampling import PolicySampler
from stages.loop import AnyScore

RIGHT, WRONG = "<think>hm</think>It is right, {}", "<think>hm</think>It is wrong, {}"
ROLLOUTS = 24


class Killed(BaseException):
    """Simulates kill -9. A real kill would also end the test, which runs in the same process as the curation."""


class Chat:
    """A chat that converts every prompt into the same single token."""

    reserved = ("<im_patch>",)

    def __init__(self) -> None:
        self.shown: dict[str, Prompt] = {}  # row id -> last prompt of this row

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        self.shown[prompt.id] = prompt
        return (1,)

    def length(self, prompt: Prompt) -> int:
        return sum(len(str(message["content"])) for message in SynthesisPrompt().chat(prompt))

    def text(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return bytes(response_ids).decode()


class Engines:
    """Engines whose responses come from a script. The script maps (filter, row id, number of the response) to a
    text."""

    def __init__(self, script: Callable[[str, str, int], str], rows: Sequence[str]) -> None:
        self.script, self.asked = script, Counter[tuple[str, str, int]]()
        self.calls = 0
        self.dies_after: int | None = None
        self._known = {
            seed_of(0, name, row, n): (name, row, n)
            for name in ("difficulty", "synthesis")
            for row in rows
            for n in range(ROLLOUTS)
        }

    def complete(self, requests: Sequence[Sequence[Request]]) -> Iterator[tuple[int, Completion]]:
        self.calls += 1
        for place, request in enumerate(request for group in requests for request in group):
            if self.dies_after == sum(self.asked.values()):
                raise Killed
            key = self._known[request.seed]
            self.asked[key] += 1
            text = tuple(self.script(*key).encode())
            yield place, Completion((1,), text, (0.0,) * len(text), "stop")


class Scorer:
    """Scores an answer with 1.0 if it contains the word "right", else with 0.0. The judge is a script that maps
    (pass, row id) to a score. If the script returns a text instead, the score is invalid and the text is the reason."""

    def __init__(self, judge: Callable[[str, str], float | str] = lambda name, row: 1.0, group: bool = False) -> None:
        self.judge, self.group, self.asked = judge, group, Counter[tuple[str, str]]()
        self.dies_after: int | None = None

    def is_group(self, task: str) -> bool:
        return self.group

    def submit(self, rollout: Rollout) -> Future[Scored]:
        return self.submit_group([rollout])[0]

    def submit_group(self, rollouts: Sequence[Rollout]) -> list[Future[Scored]]:
        futures = []
        for rollout in rollouts:
            future: Future[Scored] = Future()
            future.set_result(Scored(rollout, float("right" in rollout.answer)))
            futures.append(future)
        return futures

    def submit_row(self, prompt: Prompt, judge: str) -> Future[RowScore]:
        if self.dies_after == sum(self.asked.values()):
            raise Killed
        self.asked[judge, prompt.id] += 1
        value = self.judge(judge, prompt.id)
        future: Future[RowScore] = Future()
        future.set_result(RowScore(0.0, value) if isinstance(value, str) else RowScore(value))
        return future

    def results(self, futures: Sequence[Future[AnyScore]]) -> list[AnyScore]:
        return [future.result() for future in futures]


def row(identity: str, **changes: Any) -> CandidateRow:
    messages = ({"role": "user", "content": f"What is {identity}?"},)
    return CandidateRow(Prompt(identity, "sums", messages, ground_truth="2", **changes), 0)


def answers(folder: Path) -> Answers:
    return Answers(folder / "answers.jsonl")


def policy(
    script: Callable[[str, str, int], str], rows: Sequence[CandidateRow], scorer: Scorer | None = None
) -> PolicySampler:
    engines: Any = Engines(script, [row.prompt.id for row in rows])
    chat: Any = Chat()
    return PolicySampler(engines, chat, scorer or Scorer(), 1.0, 0, 0.1)


def right_times(counts: Mapping[str, int]) -> Callable[[str, str, int], str]:
    """Returns a script for the engines. `counts` has the number of right responses for each row id. The right responses
    to a row come first, and all later responses are wrong."""
    return lambda name, identity, n: (RIGHT if n < counts[identity] else WRONG).format(n)


def dropped(decisions: Sequence[Decision]) -> dict[str, str | None]:
    return {decision.row.prompt.id: decision.dropped for decision in decisions}


COUNTS = {"never": 0, "once": 1, "mostly": 23, "always": 24}


def prompt_with_text(text: str, identity: str = "a", images: tuple[Picture, ...] = ()) -> Prompt:
    return Prompt(identity, "t", ({"role": "user", "content": text},), images=images)


def all_filters(
    rows: Sequence[CandidateRow], script: Callable[[str, str, int], str], judge: Scorer
) -> dict[str, Filter]:
    sampler = policy(script, rows, judge)
    return {
        "decontamination": DecontaminationFilter(Benchmarks([prompt_with_text("What is leaked?", "b")], 64)),
        "checkability": CheckabilityFilter(Checkability(), judge, 0.1),
        "difficulty": DifficultyFilter(Difficulty(), Accept(), sampler, 1000),
        "synthesis": SynthesisFilter(
            SynthesisFilterOptions(max_sequence_length=5000), SynthesisOptions(), Accept(), sampler
        ),
    }


NAMES = ("leaked", "vague", "never", "once", "mostly", "always", "half")


def script(name: str, identity: str, n: int) -> str:
    counts = {**COUNTS, "half": 12} if name == "difficulty" else {"once": 24, "mostly": 3, "half": 1}
    return (RIGHT if n < counts[identity] else WRONG).format(n)


def judge() -> Scorer:
    return Scorer(lambda name, identity: float(identity != "vague" or name.endswith("/0")))


def blocks() -> list[list[CandidateRow]]:
    rows = [row(name) for name in NAMES]
    return [rows[:4], rows[4:]]


def written_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files with rows or decisions: file name -> content."""
    return {str(f.relative_to(folder)): f.read_bytes() for part in ("rows", "fates") for f in (folder / part).glob("*")}
