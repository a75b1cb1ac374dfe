"""The report of an evaluation, and rows with pictures of others. tests/rollout/test_generate.py runs real models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rl.exits import InputError
from rl.types import Picture, Prompt, Rollout, Scored
from stages.evaluation.measure import EvaluationReport, blinded
from tests.support.evaluation import CONFIG, SPLIT, evaluated_row


def test_a_report_is_json(capsys: pytest.CaptureFixture) -> None:
    report = EvaluationReport(CONFIG, ("sere",), [evaluated_row("sums", SPLIT, [])])
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

    row = evaluated_row("chat", [("a", 0.9), ("bbb", 0.5), ("cc", 0.1)], [])
    found = [compared("a", 9.0), compared("bbb", 5.0), compared("cc", 1.0)]
    told: Any = EvaluationReport(CONFIG, ("sere",), [replace(row, attempts=found)], penalties=["tone"]).json()[
        "preference"
    ]
    assert told["genrm/win_rate"] == 0.5 and told["genrm/order_agreement"] == pytest.approx(2 / 3)
    assert told["genrm/length_correlation"] == pytest.approx(-0.5)  # lengths 1, 3, 2 against 0.9, 0.5, 0.1
    assert told["genrm/score_p50"] == 0.5 and told["penalty/tone"] == 0.5
