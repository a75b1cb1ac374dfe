"""Tests the run folder: its files, the inputs that it refuses, and its content after a resume."""

import errno
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rl.record.disk import replacing
from rl.record.run_folder import RunFolder, Save
from rl.stop import Stop
from rl.types import Picture, Prompt, Rollout, Scored
from tests.support.data_rows import png
from tests.support.small_disk import small_disk


def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "stage: rlvr\n")


def sample(number: int = 0, **changes: Any) -> Scored:
    prompt = Prompt(f"p{number}", "sums", ({"role": "user", "content": "1 + 1?"},), ground_truth=2)
    rollout = Rollout(prompt, "<think>1</think>2", prompt_ids=(1, 2, 3), response_ids=(4, 5))
    given: dict[str, Any] = {"reward": 1.0} | changes
    return Scored(rollout, **given)


def saved(run: RunFolder, iteration: int = 1) -> list[dict[str, Any]]:
    with gzip.open(run.rollouts / f"{iteration:06d}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_a_new_run_has_its_recipe_and_places_for_samples_and_checkpoints(tmp_path: Path) -> None:
    run = folder(tmp_path)
    assert run.recipe.read_text() == "stage: rlvr\n"
    assert run.rollouts.is_dir() and run.checkpoints.is_dir()
    run.release()
    assert RunFolder.resume(run.path).path == run.path


def test_a_folder_in_which_a_run_is_writing_is_refused_until_it_ends(tmp_path: Path) -> None:
    code = f"from rl.record.run_folder import RunFolder; RunFolder.resume({str(tmp_path / 'run')!r}); print('mine')"
    run = folder(tmp_path)
    with pytest.raises(ValueError, match=f"another run is writing in {run.path}"):
        RunFolder.resume(run.path)
    run.release()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "mine\n"
    RunFolder.resume(run.path)  # this works, because the process that had the lock has ended


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    folder(tmp_path)
    assert "warning: the file system of" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused_with_advice_to_resume(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with pytest.raises(ValueError, match=f"already holds a run; continue it with --resume {run.path}"):
        RunFolder.create(run.path, "")


def test_a_folder_with_other_things_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(thesis.txt\)"):
        RunFolder.create(tmp_path, "")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.txt", "")
    with pytest.raises(ValueError, match="is no run folder"):
        RunFolder.resume(tmp_path)


def test_metrics_are_one_line_per_iteration(tmp_path: Path) -> None:
    run = folder(tmp_path)
    lines = [{"iteration": n, "stage": "rlvr", "reward/mean": n / 4} for n in range(3)]
    for line in lines:
        run.write_metrics(line)
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == lines == run.read_metrics()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"iteration": 2, "policy/los": 1.0}, "no entry"),
        ({"iteration": 2, "policy/loss": math.nan}, "nan, not a finite number"),
        ({"iteration": 1, "policy/loss": 1.0}, "already has iteration 1, so 1 cannot follow"),
    ],
)
def test_an_invalid_line_of_metrics_is_refused_and_not_written(
    tmp_path: Path, metrics: dict[str, Any], message: str
) -> None:
    run = folder(tmp_path)
    run.write_metrics({"iteration": 1, "policy/loss": 0.5})
    before = run.metrics.read_bytes()
    with pytest.raises(ValueError, match=message):
        run.write_metrics(metrics)
    assert run.metrics.read_bytes() == before


def test_a_saved_sample_has_the_data_row_the_response_and_the_score(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.write_rollouts(1, [sample(parts={"right": 1.0}, details={"parsed": "2"})])
    assert saved(run) == [
        {
            "id": "p0",
            "task": "sums",
            "messages": [{"role": "user", "content": "1 + 1?"}],
            "ground_truth": 2,
            "meta": {},
            "response": "<think>1</think>2",
            "reward": 1.0,
            "parts": {"right": 1.0},
            "details": {"parsed": "2"},
            "invalid": None,
            "finish": "stop",
            "prompt_tokens": 3,
            "response_tokens": 2,
            "policy_step": 0,
        }
    ]


def test_an_invalid_sample_has_a_reason_and_no_reward(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.write_rollouts(1, [sample(reward=math.nan, invalid="endpoint down")])
    assert (saved(run)[0]["reward"], saved(run)[0]["invalid"]) == (None, "endpoint down")


def test_pictures_are_named_by_path_or_by_digest(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(png())
    places = [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "image"}]
    images = (Picture.of(path), Picture.of(png(color="blue")))
    prompt = Prompt("p", "see", ({"role": "user", "content": places},), images, reference="a dog")
    run = folder(tmp_path)
    run.write_rollouts(1, [Scored(Rollout(prompt, "a cat"), 0.0)])
    content = saved(run)[0]["messages"][0]["content"]
    assert content[0] == {"type": "image", "image": str(path)}
    assert content[1:] == [places[1], {"type": "image", "digest": images[1].digest}]
    assert saved(run)[0]["reference"] == "a dog"


def test_odd_details_and_broken_text_are_saved_as_text(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.write_rollouts(1, [sample(details={"gap": math.nan, "who": Path("x"), "raw": "\udc80é"})])
    assert saved(run)[0]["details"] == {"gap": "nan", "who": "x", "raw": "\udc80é"}


@pytest.mark.parametrize(("save", "ids"), [("all", "012345"), (3, "024"), (9, "012345"), (1, "0")])
def test_saved_samples_are_spread_evenly_over_the_iteration(tmp_path: Path, save: Save, ids: str) -> None:
    run = folder(tmp_path)
    run.write_rollouts(1, [sample(n) for n in range(6)], save)
    assert [record["id"] for record in saved(run)] == [f"p{n}" for n in ids]


def test_save_none_writes_no_file(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.write_rollouts(1, [sample()], "none")
    assert list(run.rollouts.iterdir()) == []


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder(tmp_path)
    run.write_rollouts(1, [sample()])
    monkeypatch.setattr("time.time", lambda: 0.0)
    run.write_rollouts(2, [sample()])
    first, second = sorted(run.rollouts.iterdir())
    assert first.read_bytes() == second.read_bytes()


def test_a_full_disk_is_reported_and_earlier_files_stay(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mib=1) as disk:
        folder, line = RunFolder.create(disk / "run", "seed: 0\n"), {"iteration": 1, "reward/mean": 0.5}
        folder.write_metrics(line)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        for write, name in (
            (lambda: folder.write_metrics(line | {"iteration": 2, "stage": "x" * 5000}), "metrics.jsonl"),
            (lambda: folder.write_rollouts(2, [sample()]), "000002.jsonl.gz"),
            (lambda: folder.write_recipe("seed: 1\n" * 1000), "recipe.yaml"),
        ):
            with pytest.raises(Stop, match=rf"{name} could not be written: .*No space left.*continue with --resume"):
                write()
        (disk / "filler").unlink()
        folder.release()
        resumed = RunFolder.resume(disk / "run")
        resumed.truncate_after(1)
        assert resumed.read_metrics() == [line] and resumed.recipe.read_text() == "seed: 0\n"
        assert list(resumed.rollouts.iterdir()) == []


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert path.read_text() == "old"


def test_truncating_deletes_later_iterations_and_partial_files(tmp_path: Path) -> None:
    run = folder(tmp_path)
    for n in range(4):
        run.write_metrics({"iteration": n, "policy/loss": 0.1})
        run.write_rollouts(n, [sample()])
    with run.metrics.open("ab") as file:
        file.write(b'{"iteration": 4, "pol')  # as if the process was killed while it wrote this line
    (run.rollouts / "000004.jsonl.gz.partial").write_bytes(b"")
    run.release()
    resumed = RunFolder.resume(run.path)
    resumed.truncate_after(2)
    assert [line["iteration"] for line in resumed.read_metrics()] == [0, 1, 2]
    assert resumed.metrics.read_bytes().endswith(b"}\n")
    assert sorted(entry.name for entry in run.rollouts.iterdir()) == [f"{n:06d}.jsonl.gz" for n in range(3)]
    resumed.write_metrics({"iteration": 3, "policy/loss": 0.1})


def test_truncating_before_the_first_iteration_leaves_an_empty_run(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.truncate_after(-1)
    run.write_metrics({"iteration": 0, "eval/sums": 0.5})
    run.truncate_after(-1)
    assert run.read_metrics() == []
    run.write_metrics({"iteration": 0, "eval/sums": 0.5})
