"""Tests the filters of the curation with scripted judges and a scripted policy: which rows are kept."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rl.config import Accept, Checkability, Difficulty, Relevance, SynthesisFilterOptions, SynthesisOptions
from rl.types import Picture, Rollout, Scored
from rollout.pacore.prompt import SynthesisPrompt
from stages.curation.filters import (
    CandidateRow,
    CheckabilityFilter,
    DifficultyFilter,
    RelevanceFilter,
    SynthesisFilter,
)
from tests.support.curation import COUNTS, RIGHT, WRONG, Scorer, answers, dropped, policy, right_times, row
from tests.support.data_rows import png


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
