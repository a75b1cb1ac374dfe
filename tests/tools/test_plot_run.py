"""Tests the learning curve that tools/plot_run.py draws."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.support.command import ROOT
from tools.plot_run import drawing, moving_average

SVG = "{http://www.w3.org/2000/svg}"
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


def test_a_task_has_a_point_for_each_iteration_and_a_diamond_for_each_evaluation() -> None:
    panel, legend = ElementTree.fromstring(drawing(LINES)).findall(f"{SVG}g")
    (points,) = panel.findall(f"{SVG}g")
    # 2 iterations take 216 pixels. Rewards from 0 to 1 take 116 pixels, counted from the top.
    assert [(p.get("cx"), p.get("cy")) for p in points] == [("108.0", "58.0"), ("216.0", "0.0")]
    assert [d.get("d", "")[:8] for d in panel.findall(f"{SVG}path")] == ["M0.0 81.", "M216.0 2"]
    assert "sums: 0.25 → 0.75" in [text.text for text in panel.findall(f"{SVG}text")]
    assert "held-out rows, greedy" in [text.text for text in legend.iter(f"{SVG}text")]


def test_a_run_without_held_out_rows_can_be_drawn() -> None:
    panel, _ = ElementTree.fromstring(drawing(LINES[1:2])).findall(f"{SVG}g")
    assert panel.findall(f"{SVG}path") == [] and panel[0].text == "sums"


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert draw(tmp_path, tmp_path / "one.svg") == draw(tmp_path, tmp_path / "two.svg") == (0, "")
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text() == drawing(LINES)


def test_a_folder_that_cannot_be_drawn_gives_a_message(tmp_path: Path) -> None:
    assert draw(tmp_path, tmp_path / "curve.svg") == (
        2,
        f"{tmp_path} is no run folder: it has no metrics.jsonl\n",
    )
    lines = [*LINES, {"iteration": 0, "stage": "pacore"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = draw(tmp_path, tmp_path / "curve.svg")
    assert code == 2 and "several stages" in said


def test_the_moving_average_includes_neighbours_on_both_sides() -> None:
    assert moving_average([1, 2, 6, 4], 1) == [1.5, 3, 4, 5]  # means of (1, 2), (1, 2, 6), (2, 6, 4), (6, 4)
