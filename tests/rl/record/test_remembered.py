"""Tests that results of checks are remembered, and that a damaged file is no error."""

from pathlib import Path

import pytest

from rl.record.remembered import KEY_LENGTH, MOST_BYTES, Remembered

KEY, OTHER = "a" * KEY_LENGTH, "b" * KEY_LENGTH


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembered:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Remembered("results.txt")


def test_results_are_read_again(remembered: Remembered) -> None:
    assert remembered.read() == {}
    remembered.add({KEY: "one"})
    remembered.add({OTHER: ""})
    assert remembered.read() == {KEY: "one", OTHER: ""}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"no line end", b"a\tb\tc\n\n\t\n", b"x" * 64 + b"\n"])
def test_damaged_lines_are_left_out_and_the_file_can_be_continued(content: bytes, remembered: Remembered) -> None:
    remembered.file.parent.mkdir(parents=True)
    remembered.file.write_bytes(content + b"\n")
    assert remembered.read() == {}
    remembered.add({KEY: "one"})
    assert remembered.read() == {KEY: "one"}


def test_a_folder_that_cannot_be_written_is_no_error(remembered: Remembered) -> None:
    remembered.file.parent.parent.mkdir()
    remembered.file.parent.write_text("a file in place of the folder")
    remembered.add({KEY: "one"})
    assert remembered.read() == {}


def test_a_file_that_is_too_large_is_begun_anew(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered.add({KEY: "one"})
    monkeypatch.setattr("rl.record.remembered.MOST_BYTES", 10)
    assert remembered.read() == {} and not remembered.file.exists()
    assert MOST_BYTES > 10
