"""Tests the run of all filters together, and that nothing is lost when a curation is killed."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rl.config import Accept, Checkability, Difficulty, Source
from rollout.data.rows import read
from stages.curation.answers import Answers
from stages.curation.filters import (
    CandidateRow,
    CheckabilityFilter,
    Decision,
    DifficultyFilter,
)
from stages.curation.folder import CurationFolder
from stages.curation.report import make_report
from stages.curation.run import apply_filters, run_blocks
from tests.support.command import wait_until
from tests.support.curation import (
    COUNTS,
    NAMES,
    RIGHT,
    Engines,
    Killed,
    Scorer,
    all_filters,
    answers,
    blocks,
    dropped,
    judge,
    policy,
    right_times,
    row,
    script,
    written_files,
)


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
