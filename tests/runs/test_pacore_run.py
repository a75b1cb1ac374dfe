"""Tests rl.run with the stage PaCoRe and the scale model. Engines and learner are real, not scripted."""

import json
from pathlib import Path

import pytest

from rl.run import main
from tests.support.command import ROOT, metrics, run, samples

DATA = ROOT / "recipes/scale/data"
SMALL = (
    *("rl.run", ROOT / "recipes/pacore.yaml", "--profile", "cpu", "iterations=1", "prompts_per_iteration=4"),
    *("rollouts_per_prompt=4", "checkpoint.every=1", "eval.every=1", "data.eval_limit=2"),
    *(
        "synthesis.pool=online",
        "synthesis.online_rollouts=6",
        "synthesis.least_messages=2",
        "synthesis.most_messages=5",
    ),
    "synthesis.online_length=128",
    "rollout.workers=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in which the policy itself, in two engines, generates the pooled answers."""
    folder = tmp_path_factory.mktemp("runs") / "pacore"
    code, _, err = run(*SMALL, "--output", folder)
    assert code == 0, err
    return folder


def test_a_run_needs_no_cached_pools_if_the_policy_makes_its_messages(finished: Path) -> None:
    first, *others = metrics(finished)
    assert [line["iteration"] for line in (first, *others)] == [0, 1]
    assert {line["stage"] for line in (first, *others)} == {"pacore"}
    for line in others:
        assert 2 <= line["pacore/messages_mean"] <= 5
        assert 0 <= line["pacore/message_accuracy"] <= 1 and 0 <= line["pacore/accuracy"] <= 1
        assert line["rollout/logprob_gap"] < 0.001 and line["rollout/staleness"] == 0
    assert any(name.startswith("eval/") for name in first)
    assert (finished / "policy" / "model.safetensors").is_file()
    assert (finished / "policy" / "pacore.jinja").is_file()  # the template that the training has used


def test_every_sample_says_which_messages_it_saw_and_its_prompt_has_room_for_them(finished: Path) -> None:
    found = samples(finished, 1)
    assert len(found) == 16
    groups = {one["id"]: one["shown"] for one in found}
    assert len(groups) == 4
    for one in found:
        assert one["shown"] == groups[one["id"]]  # all responses to a row have the same prompt
        assert 2 <= len(one["shown"]["messages"]) == len(one["shown"]["accepted"]) <= 5
        assert all("<think>" not in message for message in one["shown"]["messages"])
        assert one["prompt_tokens"] > 25 + 5 * len(one["shown"]["messages"])


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(one) for one in (ROOT / "recipes/pacore.yaml", "--profile", "cpu", "--dry-run", *arguments)]) == 2
    return capsys.readouterr().err


def test_rows_without_a_pool_are_refused_with_advice(capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys)
    assert "2560 bad data row(s)" in said
    assert (
        "its messages_pool has 0 messages, but synthesis.least_messages is 16; make pools with python -m stages.curate"
        in said
    )


def rows(folder: Path, size: int, accuracy: float) -> Path:
    path = folder / "rows.jsonl"
    lines = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[-4:]]
    pools = [{**line, "messages_pool": [r"5+2=\boxed{7}"] * size, "pool_accuracy": accuracy} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in pools))
    return path


def test_the_length_limit_is_checked_with_the_longest_messages(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, f"data.train={rows(tmp_path, 24, 0.5)}", "max_sequence_length=200")
    assert "tokens, pictures and 24 messages included, leave no room for a response in max_sequence_length 200" in said


def test_bounds_that_exclude_every_pool_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = f"data.train={rows(tmp_path, 24, 0.5)}"
    said = refused(capsys, train, "synthesis.accuracy_under=0.375")
    assert "none of the 4 rows has a pool_accuracy between synthesis.accuracy_over" in said
    assert main([str(ROOT / "recipes/pacore.yaml"), "--profile", "cpu", "--dry-run", train]) == 0
    assert "messages   16 to 24 of the rows' pools" in capsys.readouterr().out


def test_more_positions_than_the_model_has_are_refused_with_advice(capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, "synthesis.pool=online", "max_sequence_length=8192", "learner.token_budget=8192")
    assert "max_sequence_length = 8192 is more than the 4096 positions" in said and "model.yarn: 2" in said
