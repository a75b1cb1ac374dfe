"""Tests rl.run with the shipped chain: dry runs, refused recipes, and a small chain from start to end."""

import json
from pathlib import Path

import pytest

from rl.run import main
from tests.support.command import ROOT, Command, metrics, run, wait_for, wait_for_iteration, without_times

# The arguments for a small run of the shipped chain: each stage has only two iterations.
SMALL = (
    *("rl.run", ROOT / "recipes/step3_vl.yaml", "--profile", "cpu", "rollouts_per_prompt=4"),
    *(
        f"{stage}.{size}"
        for stage in ("rlvr", "rlhf", "pacore")
        for size in ("iterations=2", "prompts_per_iteration=4")
    ),
    *("data.eval_limit=2", "eval.sampled_rows=1"),
    *("curate.rows=40", "curate.filters=[difficulty]", "curate.difficulty.rollouts=20"),
)


def test_a_dry_run_of_the_whole_recipe_prints_every_step_and_starts_nothing(tmp_path: Path) -> None:
    code, out, err = run(
        "rl.run", ROOT / "recipes/step3_vl.yaml", "--profile", "cpu", "--dry-run", "--output", tmp_path / "run"
    )
    assert code == 0, err
    for part in ("--- rlvr", "--- rlhf", "--- curate", "--- pacore", f"model      {tmp_path}/run/rlhf/policy, critic"):
        assert part in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_can_begin_with_a_later_stage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    policy = ROOT / "recipes/scale/model"
    given = ["--profile", "cpu", "--stage", "pacore", f"model.path={policy}", "pacore.iterations=100", "--dry-run"]
    assert main([str(ROOT / "recipes/step3_vl.yaml"), *given, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "--- curate" in out and "stage      pacore, 100 iterations" in out and "--- rlhf" not in out


def test_an_error_in_a_later_stage_is_reported_before_the_first_stage_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    longer = ("pacore.max_sequence_length=99999", "pacore.learner.token_budget=99999")
    assert main([str(given) for given in (*SMALL[1:], *longer, "--output", tmp_path / "run")]) == 2
    assert "is more than the 4096 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_chain_that_is_interrupted_in_every_step_ends_like_an_undisturbed_chain(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, out, err = run(*SMALL, "--output", whole, timeout=900)
    assert code == 0, err
    assert "PaCoRe@16" in out and "wins against the teacher" in out and f"policy: {whole / 'policy'}" in out
    steps = {"rlvr", "rlhf", "curate", "pacore"}
    assert {path.name for path in whole.iterdir()} >= {"recipe.yaml", *steps, "policy", "final"}
    told = [(line["stage"], line["iteration"]) for line in metrics(whole)]
    assert told == [(stage, number) for stage in ("rlvr", "rlhf", "pacore") for number in range(3)]
    table = json.loads((whole / "final/table.json").read_text())
    assert list(table["held_out"]) == ["start", "rlvr", "rlhf", "pacore"] and table["sampled"]
    assert list(table["win_rate"]) == ["rlvr", "rlhf"] and 0 <= table["sampled_win_rate"] <= 1
    assert "describing" in table["held_out"]["rlvr"] and "describing" in table["held_out"]["rlhf"]

    command = Command(*SMALL, "--output", halves)
    wait_for_iteration(halves / "rlhf", 1, command)
    command.interrupt()
    code, out, err = command.finish(timeout=600)
    assert code == 130 and f"--resume {halves}" in out
    command = Command("rl.run", "--resume", halves)
    wait_for((halves / "curate/recipe.yaml").exists, command)
    command.interrupt()
    assert command.finish(timeout=600)[0] == 130
    command = Command("rl.run", "--resume", halves)
    wait_for_iteration(halves / "pacore", 1, command)
    command.kill()
    assert command.left_behind(90) == []
    assert "keeps its recipe" in run("rl.run", "--resume", halves, "rlvr.iterations=3")[2]
    code, out, err = run("rl.run", "--resume", halves, timeout=600)
    assert code == 0, err
    assert "rlvr is done already" in out and "rlhf is done already" in out
    assert without_times(metrics(halves)) == without_times(metrics(whole))
    assert (halves / "policy/model.safetensors").read_bytes() == (whole / "policy/model.safetensors").read_bytes()
