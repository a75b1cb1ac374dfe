"""Compares the numbers in the result of an evaluation with numbers that are computed by hand."""

from dataclasses import replace

import pytest

from stages.evaluation.scores import figure, majority_at_k, pacore_at_k, pass_at_k, pass_at_one, result_rows
from tests.support.evaluation import CONFIG, SPLIT, boxed, evaluated_row


def test_pass_at_one_is_the_share_of_right_attempts_and_pass_at_k_is_one_if_any_is_right() -> None:
    row = evaluated_row("sums", SPLIT, [("4", 1.0), ("5", 0.0)])
    assert (pass_at_one(row, CONFIG), pass_at_k(row, CONFIG), pacore_at_k(row, CONFIG)) == (0.25, 1.0, 0.5)


@pytest.mark.parametrize(
    ("attempts", "right"),
    [
        (SPLIT, 0.0),
        ([(boxed(4), 1.0), (boxed(5), 0.0), (r"\boxed{4}", 1.0)], 1.0),  # both forms of 4 are the same answer
        ([(boxed(5), 0.0), (boxed(4), 1.0)], 0.0),  # if two answers are equally frequent, the first one wins
        ([("<think>never", 0.0), (boxed(4), 1.0)], 1.0),  # an attempt without an answer does not vote
        ([("<think>never", 0.0)], 0.0),
    ],
)
def test_the_majority_counts_as_right_if_its_first_attempt_is_right(
    attempts: list[tuple[str, float]], right: float
) -> None:
    assert majority_at_k(evaluated_row("sums", attempts, []), CONFIG) == right


def test_the_interval_holds_the_mean_and_shrinks_with_more_rows() -> None:
    few, many = figure([0.0, 1.0] * 10), figure([0.0, 1.0] * 1000)
    assert few.mean == many.mean == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    # For a normal distribution, the interval ends 1.96 standard errors below and above the mean. The standard error is
    # 0.5 / sqrt(2000).
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.1)
    assert figure([1.0, 1.0]) == figure([1.0]) and figure([1.0]).low == 1.0
    assert figure([0.0, 1.0, 1.0], seed=3) == figure([0.0, 1.0, 1.0], seed=3)


def test_the_table_has_a_line_for_each_task_and_mode_and_counts_all_tokens() -> None:
    sums = evaluated_row("sums", SPLIT, [("4", 1.0), ("4", 1.0)])
    rows = [sums, evaluated_row("boxes", SPLIT, [("5", 0.0)], tokens=20)]
    found = {(line.task, line.name): line for line in result_rows(rows, CONFIG, ("sere", "majority", "pacore"))}
    assert list(found)[:4] == [("boxes", n) for n in ("SeRe pass@1", "SeRe pass@4", "majority@4", "PaCoRe@4")]
    assert [found["sums", name].tokens for name in ("SeRe pass@1", "SeRe pass@4", "PaCoRe@4")] == [10, 40, 50]
    assert found["all", "PaCoRe@4"].accuracy.mean == 0.5 and found["all", "PaCoRe@4"].tokens == 75
    assert {line.name for line in result_rows(rows, CONFIG, ("sere",))} == {"SeRe pass@1", "SeRe pass@4"}
    single = [replace(row, attempts=row.attempts[:1]) for row in rows[:1]]
    lines = [(line.task, line.name) for line in result_rows(single, CONFIG, ("sere",))]
    assert lines[0] == ("sums", "SeRe pass@1") and len(lines) == len(set(lines))
