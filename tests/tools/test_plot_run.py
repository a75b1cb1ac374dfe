"""The learning curve that tools/plot_run.py draws."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.text import Text

from tests.support.command import ROOT
from tools.plot_run import drawing, moving_average

LINES = [
    {"iteration": 0, "stage": "rlvr", "eval/sums": 0.25},
    {"iteration": 1, "stage": "rlvr", "reward/mean": 0.5, "reward/sums": 0.5, "response/tokens_mean/sums": 9.0},
    {
        "iteration": 2,
        "stage": "rlvr",
        "reward/mean": 1.0,
        "reward/sums": 1.0,
        "response/tokens_mean/sums": 9.0,
        "eval/sums": 0.75,
    },
]


def draw(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, ROOT / "tools/plot_run.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.returncode, done.stderr


def points_of(curve: Line2D) -> list[list[float]]:
    return np.asarray(curve.get_xydata()).tolist()


def test_a_task_has_a_point_for_each_iteration_and_a_diamond_for_each_evaluation() -> None:
    panel, legend, _ = drawing(LINES).axes
    points, average, diamonds = map(points_of, panel.lines)
    assert points == [[1, 0.5], [2, 1.0]] and average == [[1, 0.75], [2, 0.75]]
    assert diamonds == [[0, 0.25], [2, 0.75]]
    assert panel.get_title("left") == "sums: 0.25 → 0.75" and panel.get_ylim() == (0, 1)
    assert "held-out rows, greedy" in [text.get_text() for text in legend.findobj(Text)]


def test_a_run_without_held_out_rows_is_drawn_too() -> None:
    panel = drawing(LINES[1:2]).axes[0]
    assert points_of(panel.lines[2]) == [] and panel.get_title("left") == "sums"


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert draw(tmp_path, tmp_path / "one.svg") == draw(tmp_path, tmp_path / "two.svg") == (0, "")
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
    assert ">sums: 0.25 → 0.75</text>" in (tmp_path / "one.svg").read_text()


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    assert draw(tmp_path, tmp_path / "curve.svg") == (
        2,
        f"{tmp_path} is no run folder: it has no metrics.jsonl\n",
    )
    lines = [*LINES, {"iteration": 0, "stage": "pacore"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = draw(tmp_path, tmp_path / "curve.svg")
    assert code == 2 and "several stages" in said


def test_the_moving_average_takes_in_neighbours_on_either_side() -> None:
    assert moving_average([1, 2, 6, 4], 1) == [1.5, 3, 4, 5]  # 1 and 2; 1, 2 and 6; 2, 6 and 4; 6 and 4
