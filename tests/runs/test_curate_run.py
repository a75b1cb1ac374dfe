"""Tests the command stages.curate with a real engine: which folder it writes, and which inputs it refuses. A slow test
also uses a judge."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rl.config import Source
from rollout.data.rows import read
from stages.curate import main
from tests.support.command import ROOT, Command, run, wait_for

RECIPE = ROOT / "recipes/curate.yaml"
CPU = ("stages.curate", RECIPE, "--profile", "cpu")
SMALL = (
    "curate.rows=16",
    "curate.block=8",
    "curate.filters=[decontamination,difficulty]",
    "curate.difficulty.rollouts=8",
)


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Curates a few problems of the scale model once for all tests. Returns the output folder and the printed text."""
    out = tmp_path_factory.mktemp("curation") / "out"
    code, said, err = run(*CPU, "--out", out, *SMALL)
    assert code == 0, err
    return out, said


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_kept_rows_are_training_rows_with_pools_and_results_of_filters(curated: tuple[Path, str]) -> None:
    out, _ = curated
    rows = read([Source(path=str(out / "rows"))])
    assert rows.bad == () and rows.prompts
    for prompt in rows.prompts:
        notes = prompt.meta["curation"]
        assert 0 < notes["difficulty"]["accepted"] < 8
        assert 0 < len(prompt.messages_pool) <= 8 and prompt.pool_accuracy is not None
    assert any(prompt.images for prompt in rows.prompts)


def test_every_row_has_a_decision_and_the_report_counts_the_kept_rows(curated: tuple[Path, str]) -> None:
    out, said = curated
    fates = lines(out / "fates")
    assert len({fate["id"] for fate in fates}) == 16
    kept = sum(fate["dropped"] is None for fate in fates)
    assert kept == len(lines(out / "rows"))
    assert f"{kept} of 16 rows are kept" in said and f"{kept} of 16 rows are kept" in (out / "report.html").read_text()


def test_every_response_of_the_policy_is_stored(curated: tuple[Path, str]) -> None:
    answers = lines(curated[0] / "answers")
    said = Counter((a["kind"], a["id"], a["n"]) for a in answers)
    assert max(said.values()) == 1
    assert sum(kind == "difficulty said" for kind, _, _ in said) == 16 * 8


def test_the_same_command_again_starts_nothing(curated: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, said = curated
    assert main([*map(str, CPU[1:]), "--out", str(out), *SMALL]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("curate.difficulty.rollouts=4",), "was started with another recipe:\n  curate.difficulty.rollouts"),
        (("synthesis.least_messages=2",), "was started with another recipe:\n  synthesis.least_messages"),
        (("accept.least=0.5",), "was started with another recipe:\n  accept.least"),
        (("curate.filters=[decontamination]", "data.eval=[]"), "has no benchmark"),
        (("synthesis.template={tmp}/none.jinja",), "none.jinja cannot be used"),
        (("synthesis.most_messages=2",), "synthesis.most_messages = 2 is less than least_messages"),
        (("curate.filters=[dificulty]",), "curate.filters"),
        (("data.train={tmp}/none.jsonl",), "none.jsonl does not exist"),
    ],
)
def test_a_command_that_cannot_run_gets_one_clear_message(
    curated: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: tuple[str, ...],
    message: str,
) -> None:
    given = [change.format(tmp=tmp_path) for change in changes]
    assert main([*map(str, CPU[1:]), "--out", str(curated[0]), *SMALL, *given]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([*map(str, CPU[1:]), "--out", str(tmp_path), *SMALL]) == 2
    assert "is not empty and contains no curation" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, CPU[1:]), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in (
        "512 of 2560, in blocks of 1024",
        "1280 benchmark rows; a row is dropped if its question",
        "1 pass(es) of checker",
        "16 to 24 messages",
    ):
        assert part in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_with_a_served_judge_and_a_kill_every_row_goes_through_all_filters_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (
        "curate.rows=256",
        "curate.checkability.passes=2",  # the scale model's verdicts are random, so two passes keep 1/4 of the rows
        "curate.difficulty.rollouts=8",
        "synthesis.least_messages=2",
        "synthesis.most_messages=4",
        "curate.synthesis.rollouts=8",
        "curate.synthesis.max_sequence_length=256",
    )
    command = Command(*CPU, "--out", out, *options)
    answers = out / "answers/00000-difficulty.jsonl"
    wait_for(lambda: answers.exists() and answers.stat().st_size > 1000, command)
    command.kill()
    assert command.left_behind(patience=90) == []  # Ray's processes may need a minute to end
    before = len(answers.read_text().splitlines()) - 1  # "- 1": the last line may be incomplete
    code, _, err = run(*CPU, "--out", out, *options)
    assert code == 0, err
    known = Counter((a["kind"], a["id"], a["n"]) for a in lines(out / "answers"))
    assert max(known.values()) == 1 and before > 0
    assert sum(kind == "checkability score" for kind, _, _ in known) == 2 * 256
    fates = lines(out / "fates")
    assert len({fate["id"] for fate in fates}) == 256
    assert {"checkability", "difficulty", "synthesis"} <= {fate["filter"] for fate in fates}
