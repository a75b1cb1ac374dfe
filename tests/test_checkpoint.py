"""Checkpoints of a run: complete or absent, the newest few kept."""

import json
from pathlib import Path

import pytest

from rl import checkpoint


def saver(text: str):
    def save(folder: Path) -> dict[str, object]:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_text(text)
        return {"policy_steps": 8}

    return save


def test_a_checkpoint_has_its_counters_and_what_was_saved(tmp_path: Path) -> None:
    made = checkpoint.write(tmp_path, 20, saver("w"), keep=2)
    assert made == tmp_path / "000020"
    assert checkpoint.counters(made) == {"iteration": 20, "policy_steps": 8}
    assert (made / "policy/weights").read_text() == "w"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        checkpoint.write(tmp_path, iteration, saver("w"), keep=2)
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["000020", "000030"]


def test_one_that_was_not_finished_does_not_count_and_is_written_anew(tmp_path: Path) -> None:
    def crash(folder: Path) -> dict[str, object]:
        (folder / "half").write_text("")
        raise OSError("disk full")

    checkpoint.write(tmp_path, 10, saver("w"), keep=2)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, 20, crash, keep=2)
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["000010"]
    made = checkpoint.write(tmp_path, 20, saver("again"), keep=2)
    assert not (made / "half").exists() and (made / "policy/weights").read_text() == "again"


def test_publishing_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    made = checkpoint.write(tmp_path / "checkpoints", 1, saver("new"), keep=1)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").write_text("")
    checkpoint.publish(made / "policy", tmp_path / "policy")
    assert [p.name for p in (tmp_path / "policy").iterdir()] == ["weights"]


def test_run_json_is_plain_json(tmp_path: Path) -> None:
    made = checkpoint.write(tmp_path, 3, saver("w"), keep=1)
    assert json.loads((made / "state/run.json").read_text())["iteration"] == 3
