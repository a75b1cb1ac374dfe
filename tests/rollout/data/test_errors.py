"""Tests how bad rows are listed, and that a recipe can stop at bad rows or skip them."""

from pathlib import Path

import pytest

from rl.recipe.resolve import load
from rollout.data.errors import RowError
from stages.plan import Plan, make_plan
from tests.support.command import ROOT
from tests.support.data_rows import jsonl, read_rows, row

RECIPE = ROOT / "recipes/rlvr.yaml"


def plan(*overrides: str) -> Plan:
    return make_plan(load(RECIPE, profile="cpu", overrides=[*overrides, "data.eval=[]"]).config)


def test_every_bad_row_is_listed_with_file_line_and_reason(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id=1), "{oops", "", row(id=2), "[1]", row(id=1))
    with pytest.raises(RowError) as caught:
        read_rows(path)
    assert [bad.line for bad in caught.value.bad] == [2, 5, 6]
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 bad data row(s):"
    assert lines[1].startswith(f"  {path}:2: not JSON")


def test_the_message_lists_twenty_bad_rows_and_counts_the_rest(tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        read_rows(jsonl(tmp_path, *["{"] * 25))
    assert (len(caught.value.bad), len(str(caught.value).splitlines())) == (25, 1 + 20 + 1)
    assert str(caught.value).endswith("... and 5 more")


def test_bad_rows_of_all_kinds_are_listed_together_with_their_lines(tmp_path: Path) -> None:
    long = row(id=3, task="arithmetic", messages="1 + " * 200 + "1?")
    path = jsonl(tmp_path, row(id=1, task="chess"), row(id=2, task="arithmetic", ground_truth=None), long, "{")
    with pytest.raises(RowError) as caught:
        plan(f"data.train={path}")
    said = [(bad.line, bad.reason) for bad in caught.value.bad]
    assert [line for line, _ in said] == [1, 2, 3, 4]
    for (_, reason), part in zip(
        said, ("no reward", "has no ground_truth", "leave no room for a response", "not JSON"), strict=True
    ):
        assert part in reason


def test_bad_rows_are_left_out_and_reported_if_the_recipe_skips_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id=1, task="arithmetic", ground_truth="2"), "{")
    made = plan(f"data.train={path}", "data.on_bad_row=skip")
    assert [p.id for p in made.train] == ["1"]
    assert [bad.line for bad in made.skipped] == [2]
    assert any("1 row(s) cannot be used" in line for line in made.lines())
    assert any("rows.jsonl:2: not JSON" in line for line in made.lines())


def test_a_run_without_any_usable_row_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RowError):
        plan(f"data.train={jsonl(tmp_path, '{')}", "data.on_bad_row=skip")
