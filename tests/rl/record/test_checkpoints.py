"""Tests that a checkpoint is complete or absent, that old checkpoints are deleted, and that damaged checkpoints are not
used."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.record import checkpoints
from rl.record.checkpoints import Checkpoints, damage
from rl.stop import Stop
from tests.support.small_disk import change, small_disk

JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["files", "bytes", "sha256", "a", "../b", "x" * 300]), inner, max_size=3)
    ),
)
Saver = Callable[[Path], tuple[Mapping[str, Any], Callable[[], None]]]


def saver(text: str, finish: Callable[[], None] = lambda: None) -> Saver:
    def save(folder: Path) -> tuple[Mapping[str, Any], Callable[[], None]]:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_text(text)
        return {"policy_steps": 8}, finish

    return save


def written(folder: Path, *iterations: int, keep: int = 2, keep_every: int | None = None) -> list[str]:
    """Saves a checkpoint for each of these iterations. Returns the names of the checkpoints that exist afterwards."""
    folder.mkdir(exist_ok=True)
    made = Checkpoints(folder, keep=keep, keep_every=keep_every)
    for iteration in iterations:
        made.begin(iteration, saver(f"w{iteration}"))
    made.settle()
    return [path.name for path in checkpoints.finished(folder)]


def test_a_checkpoint_has_counters_saved_files_and_a_manifest(tmp_path: Path) -> None:
    assert written(tmp_path, 20) == ["000020"]
    made = tmp_path / "000020"
    assert checkpoints.counters(made) == {"iteration": 20, "policy_steps": 8}
    assert (made / "policy/weights").read_text() == "w20"
    files = json.loads((made / "manifest.json").read_text())["files"]
    assert sorted(files) == ["policy/weights", "state/run.json"]
    assert files["policy/weights"]["bytes"] == 3
    assert damage(made) is None


def test_the_newest_checkpoints_and_those_of_every_nth_iteration_are_kept(tmp_path: Path) -> None:
    assert written(tmp_path / "a", 10, 20, 30) == ["000020", "000030"]
    assert written(tmp_path / "b", 10, 20, 30, 40, 50, keep=1, keep_every=20) == ["000020", "000040", "000050"]


def test_training_continues_while_a_checkpoint_is_written_and_only_complete_ones_are_listed(tmp_path: Path) -> None:
    done = threading.Event()

    def finish() -> None:
        assert done.wait(20)

    made = Checkpoints(tmp_path, keep=1)
    made.begin(10, saver("w", finish))
    assert checkpoints.finished(tmp_path) == [] and made.take_written() == []
    done.set()
    made.settle()
    (took,) = made.take_written()
    assert took.bytes > 1 and took.seconds >= took.blocked
    assert [path.name for path in checkpoints.finished(tmp_path)] == ["000010"]


@pytest.mark.parametrize("when", ["while copying", "while writing"])
def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_can_be_written_again(tmp_path: Path, when: str) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    def crash(folder: Path) -> tuple[Mapping[str, Any], Callable[[], None]]:
        (folder / "half").write_text("")
        if when == "while copying":
            full()
        return {}, full

    written(tmp_path, 10)
    made = Checkpoints(tmp_path, keep=2)
    with pytest.raises(Stop, match=r"checkpoint of iteration 20 could not be written: .*No space left"):
        made.begin(20, crash)
        made.settle()
    assert [path.name for path in checkpoints.finished(tmp_path)] == ["000010"]
    assert written(tmp_path, 20) == ["000010", "000020"]
    assert not (tmp_path / "000020/half").exists()


def test_too_little_disk_space_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path, keep=2, expected=1 << 60)
    with pytest.raises(
        Stop, match=r"free, and the checkpoint of iteration 5 takes about 1.05e\+06 TiB.* room on the disk"
    ):
        made.begin(5, saver("w"))
    assert list(tmp_path.iterdir()) == []


def broken(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-1])
    else:
        content[0] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how, said", [
    ("missing", "policy/weights is missing"),
    ("cut", "policy/weights has 2 bytes instead of 3"),
    ("flipped", "policy/weights was changed after it was written"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path: Path, how: str, said: str) -> None:
    written(tmp_path, 10, 20)
    broken(tmp_path / "000020/policy/weights", how)
    heard: list[str] = []
    assert Checkpoints(tmp_path, keep=2).newest(heard.append) == tmp_path / "000010"
    assert len(heard) == 1 and said in heard[0] and "000020 is damaged" in heard[0]


@pytest.mark.parametrize("content", ["{", None])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_iteration_0(
    tmp_path: Path, content: str | None
) -> None:
    written(tmp_path, 10)
    manifest = tmp_path / "000010/manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(Stop, match=r"no checkpoint in .* can be used.*manifest\.json cannot be read.*another --output"):
        Checkpoints(tmp_path, keep=2).newest()


def test_a_run_without_checkpoints_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, keep=2).newest() is None


def test_a_disk_that_becomes_read_only_is_reported_and_its_checkpoints_stay_valid(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mib=1) as folder:
        written(folder, 1)
        change(folder, "ro")
        with pytest.raises(Stop, match=rf"iteration 2 could not be written: .*Read-only file system: '{folder}"):
            Checkpoints(folder, keep=2).begin(2, saver("w"))
        change(folder, "rw")
        assert Checkpoints(folder, keep=2).newest() == folder / "000001"


def test_a_disk_that_fills_up_during_a_checkpoint_keeps_the_earlier_checkpoints(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mib=1) as folder:
        written(folder, 1)
        made = Checkpoints(folder, keep=1)
        with pytest.raises(Stop, match=r"iteration 2 could not be written: .*No space left on device"):
            made.begin(2, saver("w" * (1 << 21)))  # 2 MiB do not fit on the disk
            made.settle()
        assert made.newest() == folder / "000001"
        assert written(folder, 3) == ["000001", "000003"]  # the unfinished checkpoint 2 was deleted


def test_an_old_checkpoint_that_cannot_be_deleted_stops_the_run_but_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 1)
    made = Checkpoints(tmp_path, keep=1)

    def refuse(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    made.begin(2, saver("w"))
    with pytest.raises(Stop, match=r"old checkpoint .*000001 could not be removed: .*busy"):
        made.settle()
    assert made.newest() == tmp_path / "000002"


def test_publishing_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    written(tmp_path / "checkpoints", 1)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").write_text("")
    checkpoints.publish(tmp_path / "checkpoints/000001/policy", tmp_path / "policy")
    assert [p.name for p in (tmp_path / "policy").iterdir()] == ["weights"]


@given(content=JSON.map(json.dumps) | st.text(max_size=20))
def test_a_manifest_with_any_content_is_damage_or_fits(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tmp_path_factory.mktemp("fuzz")
    (checkpoint / checkpoints.MANIFEST).write_text(content)
    fits = damage(checkpoint) is None
    assert not fits or json.loads(content)["files"] == {}
