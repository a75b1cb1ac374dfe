"""Tests the final table of a chain: held-out rewards and win rates after each stage."""

import pytest
from rich.console import Console

from stages.pipeline import FinalTable, before_and_after


def test_the_first_evaluation_of_a_stage_completes_the_results_of_the_previous_stage() -> None:
    held_out, wins = before_and_after(
        {
            "rlvr": [{"iteration": 0, "eval/sums": 0.2}, {"iteration": 1}, {"iteration": 2, "eval/sums": 0.6}],
            "rlhf": [
                {"iteration": 0, "eval/sums": 0.5, "eval/chats": 0.3, "eval/win_rate": 0.25},
                {"iteration": 1, "eval/sums": 0.6, "eval/chats": 0.7, "eval/win_rate": 0.75},
            ],
            "pacore": [{"iteration": 0, "eval/sums": 0.5, "eval/places": 0.4}, {"iteration": 1, "eval/sums": 0.9}],
        }
    )
    assert held_out == {
        "start": {"sums": 0.2},
        "rlvr": {"sums": 0.6, "chats": 0.3},
        "rlhf": {"sums": 0.6, "chats": 0.7},
        "pacore": {"sums": 0.9},
    }
    assert wins == {"rlvr": 0.25, "rlhf": 0.75}


def test_the_final_table_shows_the_win_rate_of_the_last_policy(capsys: pytest.CaptureFixture) -> None:
    FinalTable({"rlhf": {"chats": 0.7}}, (), {"rlhf": 0.75}, 0.625).show(Console(width=100))
    out = capsys.readouterr().out
    assert "SeRe pass@1" in out and "0.750" in out and "0.625" in out
