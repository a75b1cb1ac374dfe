"""Tests the report of an evaluation, and evaluation with the pictures of other rows. tests/rollout/test_generate.py
tests evaluations with real models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rl.exits import InputError
from rl.types import Picture, Prompt, Rollout, Scored
from stages.evaluation.measure import EvaluationReport, blinded
from tests.support.evaluation import CONFIG, SPLIT, evaluated_row


def test_a_report_can_be_printed_as_json_and_as_a_table(capsys: pytest.CaptureFixture) -> None:
    report = EvaluationReport(CONFIG, ("sere",), [evaluated_row("sums", SPLIT, [])])
    values: Any = report.json()
    assert (
        not values["blind"]
        and values["rows"] == 1
        and values["results"][0]["accuracy"]["mean"] == 0.25
        and values["synthesis"] == {}
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
        InputError, match="no other row of task boxes has 1 pictures that can replace the pictures of row 0"
    ):
        blinded(rows[:2])
    with pytest.raises(InputError, match="no row has a picture"):
        blinded([])


def test_with_a_judge_the_report_has_win_rate_and_length_correlation() -> None:
    def compared(text: str, answer: float) -> Scored:
        details = {"answer": answer, "reference": 5.0, "orders_agree": answer > 1}
        parts = {"genrm": answer / 10, "tone": 0.5}
        return Scored(Rollout(Prompt("a", "chat", ()), text), answer / 10, parts=parts, details={"genrm": details})

    row = evaluated_row("chat", [("a", 0.9), ("bbb", 0.5), ("cc", 0.1)], [])
    found = [compared("a", 9.0), compared("bbb", 5.0), compared("cc", 1.0)]
    values: Any = EvaluationReport(CONFIG, ("sere",), [replace(row, attempts=found)], penalties=["tone"]).json()[
        "preference"
    ]
    assert values["genrm/win_rate"] == 0.5 and values["genrm/order_agreement"] == pytest.approx(2 / 3)
    # The answers have the lengths 1, 3 and 2, and the scores 0.9, 0.5 and 0.1.
    assert values["genrm/length_correlation"] == pytest.approx(-0.5)
    assert values["genrm/score_p50"] == 0.5 and values["penalty/tone"] == 0.5
