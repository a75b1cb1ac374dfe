"""The figures of an evaluation, by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rl.evaluate import config_of, parser
from rl.exits import InputError
from rl.types import Picture, Prompt, Rollout, Scored
from rollout.pacore.rounds import PacoreResult, Reply, Round
from stages.evaluation.measure import EvaluationReport, blinded
from stages.evaluation.scores import (
    EvaluatedRow,
    figure,
    majority_at_k,
    pacore_at_k,
    pass_at_k,
    pass_at_one,
    result_rows,
)
from tests.support.configs import config

CONFIG = config()


def judged(
    task: str, attempts: list[tuple[str, float]], answers: list[tuple[str, float]], tokens: int = 10
) -> EvaluatedRow:
    prompt = Prompt("a", task, ())

    def scored(said: list[tuple[str, float]]) -> list[Scored]:
        return [Scored(Rollout(prompt, text), reward) for text, reward in said]

    rounds = [Round(tuple(Reply(text, "stop", tokens, 5) for text, _ in said)) for said in (attempts, answers) if said]
    return EvaluatedRow(prompt, PacoreResult(tuple(rounds)), scored(attempts), scored(answers))


def boxed(value: int) -> str:
    return rf"<think>hm</think>it is \boxed{{{value}}}"


SPLIT = [(boxed(5), 0.0), (boxed(4), 1.0), (boxed(5), 0.0), (boxed(6), 0.0)]


def test_pass_at_one_is_the_share_and_pass_at_k_whether_any_is_right() -> None:
    row = judged("sums", SPLIT, [("4", 1.0), ("5", 0.0)])
    assert (pass_at_one(row, CONFIG), pass_at_k(row, CONFIG), pacore_at_k(row, CONFIG)) == (0.25, 1.0, 0.5)


@pytest.mark.parametrize(
    ("attempts", "right"),
    [
        (SPLIT, 0.0),
        ([(boxed(4), 1.0), (boxed(5), 0.0), (r"\boxed{4}", 1.0)], 1.0),  # said in other words
        ([(boxed(5), 0.0), (boxed(4), 1.0)], 0.0),  # of two alike the first
        ([("<think>never", 0.0), (boxed(4), 1.0)], 1.0),  # who does not answer has no vote
        ([("<think>never", 0.0)], 0.0),
    ],
)
def test_the_majority_is_right_if_its_first_voter_is(attempts: list[tuple[str, float]], right: float) -> None:
    assert majority_at_k(judged("sums", attempts, []), CONFIG) == right


def test_the_interval_holds_the_mean_and_shrinks_with_more_rows() -> None:
    few, many = figure([0.0, 1.0] * 10), figure([0.0, 1.0] * 1000)
    assert few.mean == many.mean == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.1)  # as the normal distribution says
    assert figure([1.0, 1.0]) == figure([1.0]) and figure([1.0]).low == 1.0
    assert figure([0.0, 1.0, 1.0], seed=3) == figure([0.0, 1.0, 1.0], seed=3)


def test_the_table_has_a_line_for_each_task_and_way_and_counts_all_tokens() -> None:
    rows = [judged("sums", SPLIT, [("4", 1.0), ("4", 1.0)]), judged("boxes", SPLIT, [("5", 0.0)], tokens=20)]
    found = {(line.task, line.name): line for line in result_rows(rows, CONFIG, ("sere", "majority", "pacore"))}
    assert list(found)[:4] == [("boxes", n) for n in ("SeRe pass@1", "SeRe pass@4", "majority@4", "PaCoRe@4")]
    assert [found["sums", name].tokens for name in ("SeRe pass@1", "SeRe pass@4", "PaCoRe@4")] == [10, 40, 50]
    assert found["all", "PaCoRe@4"].accuracy.mean == 0.5 and found["all", "PaCoRe@4"].tokens == 75
    assert {line.name for line in result_rows(rows, CONFIG, ("sere",))} == {"SeRe pass@1", "SeRe pass@4"}
    single = [replace(row, attempts=row.attempts[:1]) for row in rows[:1]]
    told = [(line.task, line.name) for line in result_rows(single, CONFIG, ("sere",))]
    assert told[0] == ("sums", "SeRe pass@1") and len(told) == len(set(told))


def test_a_recipe_that_asks_for_model_and_rows_is_given_those_of_the_command() -> None:
    given = ["--recipe", "rlhf", "--model", "owner/name", "--data", "rows.jsonl", "endpoints.judge.model=owner/judge"]
    config = config_of(parser().parse_intermixed_args(given))
    assert config.model.path == "owner/name" and [source.path for source in config.data.eval] == [
        str(Path("rows.jsonl").absolute())
    ]


def test_a_report_is_json(capsys: pytest.CaptureFixture) -> None:
    report = EvaluationReport(CONFIG, ("sere",), [judged("sums", SPLIT, [])])
    told: Any = report.json()
    assert (
        not told["blind"]
        and told["rows"] == 1
        and told["results"][0]["accuracy"]["mean"] == 0.25
        and told["synthesis"] == {}
    )
    report.show()
    assert "0.250" in capsys.readouterr().out
    blind = replace(report, blind=True)
    blind.show()
    assert blind.json()["blind"] and "with pictures of other rows" in capsys.readouterr().out


def test_a_blind_policy_sees_the_pictures_of_other_rows_of_its_task() -> None:
    one, two, three = (Picture(bytes(n), str(n)) for n in range(3))
    copy = Picture(Path("copy.png"), one.digest)
    pictures = [("boxes", one), ("boxes", copy), ("points", three), ("boxes", two), ("points", one)]
    rows = [Prompt(str(n), task, (), (picture,)) for n, (task, picture) in enumerate(pictures)]
    assert [row.images for row in blinded(rows)] == [(two,), (two,), (one,), (one,), (three,)]
    assert [row.id for row in blinded(rows)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(
        InputError, match="no other row of task boxes has 1 pictures to show in place of those of row 0"
    ):
        blinded(rows[:2])
    with pytest.raises(InputError, match="no row has a picture"):
        blinded([])


def test_where_a_judge_compares_with_a_teacher_the_report_tells_who_wins_and_what_length_has_to_do_with_it() -> None:
    def compared(text: str, answer: float) -> Scored:
        said = {"answer": answer, "reference": 5.0, "orders_agree": answer > 1}
        parts = {"genrm": answer / 10, "tone": 0.5}
        return Scored(Rollout(Prompt("a", "chat", ()), text), answer / 10, parts=parts, details={"genrm": said})

    row = judged("chat", [("a", 0.9), ("bbb", 0.5), ("cc", 0.1)], [])
    found = [compared("a", 9.0), compared("bbb", 5.0), compared("cc", 1.0)]
    told: Any = EvaluationReport(CONFIG, ("sere",), [replace(row, attempts=found)], penalties=["tone"]).json()[
        "preference"
    ]
    assert told["genrm/win_rate"] == 0.5 and told["genrm/order_agreement"] == pytest.approx(2 / 3)
    assert told["genrm/length_correlation"] == pytest.approx(-0.5)  # lengths 1, 3, 2 against 0.9, 0.5, 0.1
    assert told["genrm/score_p50"] == 0.5 and told["penalty/tone"] == 0.5
