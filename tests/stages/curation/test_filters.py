"""Tests curation with scripted judges and a scripted policy: which rows are kept, and that nothing is lost when a
curation is killed."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rl.config import Accept, Checkability, Difficulty, Relevance, Source, SynthesisFilterOptions, SynthesisOptions
from rl.types import Completion, Picture, Prompt, Request, Rollout, RowScore, Scored
from rollout.data.decontamination import Benchmarks
from rollout.data.rows import read
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
    RelevanceFilter,
    SynthesisFilter,
)
from stages.curation.folder import CurationFolder
from stages.curation.report import make_report
from stages.curation.run import apply_filters, run_blocks
from stages.curation.sampling import PolicySampler
from stages.loop import AnyScore
from tests.support.command import wait_until
from tests.support.data_rows import png

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


def test_difficulty_keeps_rows_that_are_accepted_once_or_all_but_once(tmp_path: Path) -> None:
    rows = [row(name) for name in COUNTS]
    with answers(tmp_path) as known:
        decisions = DifficultyFilter(Difficulty(), Accept(), policy(right_times(COUNTS), rows), 1000)(rows, known)
    assert dropped(decisions) == {
        "never": "never accepted",
        "once": None,
        "mostly": None,
        "always": "always accepted",
    }
    assert [decision.row.notes["difficulty"]["accepted"] for decision in decisions] == [0, 1, 23, 24]


def test_the_final_messages_become_the_pool_with_their_accuracy(tmp_path: Path) -> None:
    rows = [row("once")]
    with answers(tmp_path) as known:
        (decision,) = DifficultyFilter(Difficulty(), Accept(), policy(right_times(COUNTS), rows), 1000)(rows, known)
    pool = decision.row.prompt.messages_pool
    assert (len(pool), pool[0], pool[23]) == (24, "It is right, 0", "It is wrong, 23")
    assert decision.row.prompt.pool_accuracy == pytest.approx(1 / 24)


def test_a_response_without_an_answer_is_no_message(tmp_path: Path) -> None:
    rows = [row("a")]

    def script(name: str, identity: str, n: int) -> str:
        return "<think>hm" if n < 5 else (RIGHT if n < 8 else WRONG).format(n)

    with answers(tmp_path) as known:
        (decision,) = DifficultyFilter(Difficulty(), Accept(), policy(script, rows), 1000)(rows, known)
    assert (len(decision.row.prompt.messages_pool), decision.row.prompt.pool_accuracy) == (19, pytest.approx(3 / 19))
    assert decision.row.notes["difficulty"] == {"accepted": 3, "of": 24, "tokens_mean": pytest.approx(27.5, abs=10)}


def test_an_answer_with_a_control_token_is_no_message(tmp_path: Path) -> None:
    rows = [row("a")]

    def script(name: str, identity: str, n: int) -> str:
        return RIGHT.format("<im_patch>") if n == 0 else WRONG.format(n)

    with answers(tmp_path) as known:
        (decision,) = DifficultyFilter(Difficulty(), Accept(), policy(script, rows), 1000)(rows, known)
    assert (decision.dropped, len(decision.row.prompt.messages_pool), decision.row.prompt.pool_accuracy) == (
        None,
        23,
        0.0,
    )


def test_accept_allows_for_rounding_in_a_sum_of_weights() -> None:
    assert Accept().takes("sums", 0.7 + 0.2 + 0.1 - 2e-16)


@pytest.mark.parametrize(
    ("counts", "why"),
    [((1, 1), None), ((2, 0), "could not be scored"), ((0, 2), "could not be scored"), ((0, 0), "could not be scored")],
)
def test_failed_scores_drop_a_row_only_if_they_could_change_the_decision(
    tmp_path: Path, counts: tuple[int, int], why: str | None
) -> None:
    class Flaky(Scorer):
        def submit_group(self, rollouts: Sequence[Rollout]) -> list[Future[Scored]]:
            (future,) = super().submit_group(rollouts)
            if "broken" in rollouts[0].answer:
                future = Future()
                future.set_result(Scored(rollouts[0], 0.0, "the reward died"))
            return [future]

    right, wrong = counts
    texts = [RIGHT.format("")] * right + [WRONG.format("")] * wrong

    def script(name: str, identity: str, n: int) -> str:
        return texts[n] if n < len(texts) else "broken"

    rows = [row("a")]
    with answers(tmp_path) as known:
        (decision,) = DifficultyFilter(Difficulty(rollouts=4), Accept(), policy(script, rows, Flaky()), 1000)(
            rows, known
        )
    assert decision.dropped == why
    assert len(decision.row.prompt.messages_pool) == right + wrong


def test_the_threshold_of_acceptance_can_differ_by_task() -> None:
    accept = Accept(least=1.0, by_task={"grounding": 0.5})
    assert [accept.takes("sums", reward) for reward in (0.5, 0.99, 1.0)] == [False, False, True]
    assert [accept.takes("grounding", reward) for reward in (0.4999, 0.5, 1.0)] == [False, True, True]


@pytest.mark.parametrize(("valid", "stays"), [(0, False), (3, False), (4, True)])
def test_checkability_keeps_a_row_only_if_every_pass_says_valid(tmp_path: Path, valid: int, stays: bool) -> None:
    judge = Scorer(lambda name, identity: float(int(name.rpartition("/")[2]) < valid))
    with answers(tmp_path) as known:
        (decision,) = CheckabilityFilter(Checkability(), judge, 0.1)([row("a")], known)
    assert (decision.dropped is None) == stays
    assert decision.row.notes["checkability"] == {"valid": valid, "of": 4}
    assert len(judge.asked) == 4


def test_a_row_without_a_verdict_is_neither_valid_nor_invalid(tmp_path: Path) -> None:
    judge = Scorer(lambda name, identity: "no verdict" if name.endswith("/3") else 1.0)
    with answers(tmp_path) as known:
        (decision,) = CheckabilityFilter(Checkability(), judge, 0.1)([row("a")], known)
    assert (decision.dropped, decision.detail) == ("could not be scored", "no verdict")


def test_relevance_asks_about_rows_with_pictures_only(tmp_path: Path) -> None:
    picture = (Picture.of(png()),)
    grades = {"least": 0.5, "less": 0.49}
    judge = Scorer(lambda name, identity: grades[identity])
    rows = [row("none"), row("least", images=picture), row("less", images=picture)]
    with answers(tmp_path) as known:
        decisions = RelevanceFilter(Relevance(), judge, 0.1)(rows, known)
    assert dropped(decisions) == {
        "none": None,
        "least": None,
        "less": "the pictures are not relevant to the question",
    }
    assert set(judge.asked) == {("relevance/0", "least"), ("relevance/0", "less")}


# The filter synthesis


def row_with_pool(identity: str, size: int = 24, share: float = 0.5) -> CandidateRow:
    return row(identity, messages_pool=tuple(f"message {n}" for n in range(size)), pool_accuracy=share)


def synthesis_filter(
    script: Callable[[str, str, int], str], rows: Sequence[CandidateRow], longest: int = 65_536, **bounds: Any
) -> SynthesisFilter:
    options = SynthesisFilterOptions(max_sequence_length=longest)
    return SynthesisFilter(options, SynthesisOptions(**bounds), Accept(), policy(script, rows))


def test_synthesis_keeps_rows_that_are_sometimes_but_not_always_accepted(tmp_path: Path) -> None:
    rows = [row_with_pool(name) for name in COUNTS]
    with answers(tmp_path) as known:
        decisions = synthesis_filter(right_times(COUNTS), rows)(rows, known)
    assert dropped(decisions) == {"never": "never accepted", "once": None, "mostly": None, "always": "always accepted"}


def test_the_policy_sees_problem_and_messages_and_rewards_see_the_problem(tmp_path: Path) -> None:
    rows = [row_with_pool("once")]
    filter = synthesis_filter(right_times(COUNTS), rows)
    with answers(tmp_path) as known:
        (decision,) = filter(rows, known)
    chat: Any = filter.policy.chat
    text = SynthesisPrompt().chat(chat.shown["once"])[-1]["content"]
    assert "What is once?" in text and 16 <= text.count("Answer ") <= 24
    assert decision.row.prompt == rows[0].prompt


@pytest.mark.parametrize(
    ("size", "share", "bounds", "why"),
    [
        (15, 0.5, {}, "too few messages"),
        (16, 0.5, {}, None),
        (24, 0.0, {"accuracy_over": 0.0}, "messages too often wrong"),
        (24, 1 / 24, {"accuracy_over": 0.0}, None),
        (24, 8 / 24, {"accuracy_under": 9 / 24}, None),
        (24, 9 / 24, {"accuracy_under": 9 / 24}, "messages too often right"),
        (24, 0.5, {"longest": 100}, "too long with its messages"),
    ],
)
def test_rows_whose_pools_are_too_small_too_long_or_out_of_bounds_are_dropped(
    tmp_path: Path, size: int, share: float, bounds: dict[str, Any], why: str | None
) -> None:
    rows = [row_with_pool("once", size, share)]
    with answers(tmp_path) as known:
        (decision,) = synthesis_filter(right_times(COUNTS), rows, **bounds)(rows, known)
    assert decision.dropped == why


def prompt_with_text(text: str, identity: str = "a", images: tuple[Picture, ...] = ()) -> Prompt:
    return Prompt(identity, "t", ({"role": "user", "content": text},), images=images)


# All filters together


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


def test_rows_decisions_and_report_have_the_result_of_every_row(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    run_blocks(blocks(), all_filters([row(n) for n in NAMES], script, judge()), out, ["s"], lambda message: None)
    rows = read([Source(path=str(tmp_path / "rows"))])
    assert rows.bad == () and [p.id for p in rows.prompts] == ["mostly", "half"]
    mostly = rows.prompts[0]
    assert len(mostly.messages_pool) == 24 and mostly.pool_accuracy == pytest.approx(23 / 24)
    assert mostly.meta["curation"]["checkability"] == {"valid": 4, "of": 4}
    assert [mostly.meta["curation"][name]["accepted"] for name in ("difficulty", "synthesis")] == [23, 3]
    names = ["decontamination", "checkability", "difficulty", "synthesis"]
    report = make_report([out.decisions(0), out.decisions(1)], names, ["s"])
    assert [(one.filter, one.before, one.after) for one in report.counts] == [
        ("decontamination", 7, 6),
        ("checkability", 6, 5),
        ("difficulty", 5, 3),
        ("synthesis", 3, 2),
    ]
    assert {(reason.filter, reason.why): reason.count for reason in report.reasons} == {
        ("decontamination", "the same question"): 1,
        ("checkability", "not every pass calls it valid"): 1,
        ("difficulty", "never accepted"): 1,
        ("difficulty", "always accepted"): 1,
        ("synthesis", "always accepted"): 1,
    }
    assert sum(count for _, count in report.histograms[0].bars) == 5
    assert "leaked: the question of b | What is leaked?" in report.text()
    assert "<h1>2 of 7 rows are kept</h1>" in report.html()


def test_a_report_for_a_terminal_has_no_control_characters(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    asked = prompt_with_text("What is \x1b[2J leaked?", "x\x07")
    filters = {"decontamination": DecontaminationFilter(Benchmarks([replace(asked, id="b")], 64))}
    run_blocks([[CandidateRow(asked, 0)]], filters, out, ["s"], lambda message: None)
    text = make_report([out.decisions(0)], ["decontamination"], ["s"]).text()
    assert "What is [2J leaked?" in text and not set("\x1b\x07") & set(text)


def test_a_report_counts_each_source_separately(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    rows = [CandidateRow(row("leaked").prompt, 0), CandidateRow(row("fine").prompt, 1)]
    filters = {"decontamination": DecontaminationFilter(Benchmarks([prompt_with_text("What is leaked?", "b")], 64))}
    run_blocks([rows], filters, out, ["one.jsonl", "two.jsonl"], lambda message: None)
    report = make_report([out.decisions(0)], ["decontamination"], ["one.jsonl", "two.jsonl"])
    assert [(one.source, one.before, one.after) for one in report.counts] == [
        ("", 2, 1),
        ("one.jsonl", 1, 0),
        ("two.jsonl", 1, 1),
    ]


def test_texts_of_models_are_escaped_in_the_html_report(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    bad = CandidateRow(prompt_with_text("<script>alert(1)</script>", "x"), 0)
    filters = {"decontamination": DecontaminationFilter(Benchmarks([bad.prompt], 64))}
    run_blocks([[bad]], filters, out, ["s"], lambda message: None)
    page = make_report([out.decisions(0)], ["decontamination"], ["s"]).html()
    assert "<script>" not in page and "&lt;script&gt;" in page


@dataclass
class Attempt:
    """Runs a curation in one folder, once or several times. `run` can kill the curation after a given number of
    answers of the engines or of the judge."""

    folder: Path
    engines: list[Engines] = field(default_factory=list)
    judges: list[Scorer] = field(default_factory=list)

    def run(self, engine_answers: int | None = None, judge_answers: int | None = None) -> None:
        scorer = judge()
        scorer.dies_after = judge_answers
        filters = all_filters([row(n) for n in NAMES], script, scorer)
        difficulty: Any = filters["difficulty"]
        difficulty.policy.engines.dies_after = engine_answers
        self.engines.append(difficulty.policy.engines)
        self.judges.append(scorer)
        run_blocks(blocks(), filters, CurationFolder(self.folder), ["s"], lambda message: None)

    @property
    def most(self) -> int:
        """The number of times that the most frequent question was asked, in all calls of `run` together."""
        asked = sum((e.asked for e in self.engines), Counter[Any]()) + sum((j.asked for j in self.judges), Counter())
        return max(asked.values())


def test_after_a_kill_at_any_answer_nothing_is_lost_repeated_or_asked_twice(tmp_path: Path) -> None:
    whole = Attempt(tmp_path / "whole")
    whole.run()
    engine_answers, judge_answers = sum(whole.engines[0].asked.values()), sum(whole.judges[0].asked.values())
    kills = [{"engine_answers": n} for n in range(0, engine_answers, 17)]
    kills += [{"judge_answers": n} for n in range(0, judge_answers, 3)]
    for number, kill in enumerate(kills):
        broken = Attempt(tmp_path / str(number))
        with pytest.raises(Killed):
            broken.run(**kill)
        broken.run()
        assert written_files(broken.folder) == written_files(whole.folder)
        assert broken.most == 1


@pytest.mark.parametrize("lost", ["rows/00001.jsonl", "rows/00000.jsonl"])
def test_after_a_kill_before_a_block_is_written_nothing_is_asked_again(tmp_path: Path, lost: str) -> None:
    attempt = Attempt(tmp_path)
    attempt.run()
    before = written_files(tmp_path)
    (tmp_path / lost).unlink()
    attempt.run(engine_answers=0, judge_answers=0)
    assert written_files(tmp_path) == before


def test_an_answer_that_a_crash_has_cut_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Answers(path) as known:
        known.put("k", "a", 0, {"x": 1})
        known.put("k", "a", 1, {"x": 2})
    path.write_bytes(path.read_bytes()[:-5])
    with Answers(path) as known:
        assert known.get("k", "a", 0) == {"x": 1} and known.get("k", "a", 1) is None
        known.put("k", "a", 1, {"x": 3})
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [1, 3]


def test_judges_work_on_the_next_block_while_the_policy_works_on_this_one(tmp_path: Path) -> None:
    filters = all_filters([row(n) for n in NAMES], script, scorer := judge())
    difficulty: Any = filters["difficulty"]

    def waiting(rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]:
        # The row "always" belongs to the next block.
        wait_until(lambda: any(identity == "always" for _, identity in scorer.asked))
        return difficulty(rows, answers)

    run_blocks(blocks(), {**filters, "difficulty": waiting}, CurationFolder(tmp_path), ["s"], lambda message: None)
    assert len(written_files(tmp_path)) == 4


def test_failed_judgements_are_asked_again(tmp_path: Path) -> None:
    replies: list[float | str] = ["the server is down", 1.0]
    for stays in (False, True):
        with answers(tmp_path) as known:
            scorer = Scorer(lambda name, identity, reply=replies[stays]: reply)
            (decision,) = CheckabilityFilter(Checkability(passes=1), scorer, 0.1)([row("a")], known)
        assert (decision.dropped is None) == stays


@pytest.mark.parametrize("group", [False, True])
def test_group_rewards_get_all_responses_of_a_row_together(tmp_path: Path, group: bool) -> None:
    rows = [row("once"), row("never")]
    with answers(tmp_path) as known:
        sampler = policy(right_times(COUNTS), rows, Scorer(group=group))
        decisions = DifficultyFilter(Difficulty(), Accept(), sampler, 1000)(rows, known)
    assert dropped(decisions) == {"once": None, "never": "never accepted"}


def test_all_prompts_go_to_the_engines_in_one_call(tmp_path: Path) -> None:
    rows = [row(f"r{n}") for n in range(50)]
    sampler = policy(lambda name, identity, n: RIGHT.format(n), rows)
    with answers(tmp_path) as known:
        decisions = [Decision(row) for row in rows]
        filters = {"difficulty": DifficultyFilter(Difficulty(), Accept(), sampler, 1000)}
        apply_filters(decisions, filters, lambda name: known, lambda message: None)
    engines: Any = sampler.engines
    assert (engines.calls, sum(engines.asked.values())) == (1, 50 * 24)
