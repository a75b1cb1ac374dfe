"""Tests that the pictures of rows are decoded once, and that the result is remembered."""

from pathlib import Path

import pytest

from rl.pixels import TURNED
from rl.types import Picture, Prompt
from rollout.data import pictures
from rollout.data.pictures import PictureWatch, decode_all
from tests.support import tiny
from tests.support.photos import stored
from tests.support.reward_samples import picture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def damaged(tmp_path: Path) -> Picture:
    file = tmp_path / "cut.png"
    whole = picture(90, 90).source
    assert isinstance(whole, bytes)
    file.write_bytes(whole[: len(whole) * 2 // 3])
    return Picture.of(file)


def test_damaged_pictures_are_named_and_conversions_are_counted(tmp_path: Path) -> None:
    cut = damaged(tmp_path)
    found = decode_all([picture(8, 8), Picture.of(stored(6)), Picture.of(stored(6)), cut])
    assert dict(found.conversions) == {TURNED: 1}
    assert list(found.damaged) == [cut.digest]
    assert str(cut.source) in found.damaged[cut.digest]


def test_a_picture_is_decoded_only_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [picture(8, 8), Picture.of(stored(6)), damaged(tmp_path)]
    first, seen = decode_all(rows), []
    monkeypatch.setattr(pictures, "_decoded", lambda one: seen.append(one) or "damaged")
    again = decode_all(rows)
    assert (again.conversions, list(again.damaged)) == (first.conversions, list(first.damaged))
    assert seen == rows[2:]  # a damaged picture is tried again, because it may have been replaced


def test_a_sample_of_the_pictures_can_be_decoded(tmp_path: Path) -> None:
    rows = [damaged(tmp_path), *(picture(8 + n, 8) for n in range(20))]
    first = min(rows, key=lambda one: one.digest)
    assert list(decode_all(rows, most=1).damaged) == ([first.digest] if first is rows[0] else [])
    assert list(decode_all(rows, most=21).damaged) == [rows[0].digest]


def with_picture(file: Path) -> Prompt:
    return Prompt(file.name, "t", (), (Picture.of(file),))


def test_a_picture_that_becomes_unreadable_is_found_when_it_is_needed(tmp_path: Path) -> None:
    for name in ("gone", "cut", "other", "same"):
        tiny.image((40, 40)).save(tmp_path / f"{name}.png")
    rows = [with_picture(tmp_path / f"{name}.png") for name in ("gone", "cut", "other", "same")]
    watch = PictureWatch()
    assert watch.unreadable(rows) == {}
    (tmp_path / "gone.png").unlink()
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:99])
    tiny.image((40, 41)).save(tmp_path / "other.png")
    tiny.image((40, 40)).save(tmp_path / "same.png")
    found = watch.unreadable(rows)
    assert list(found) == [0, 1, 2]
    assert "gone.png cannot be read" in found[0] and "cut.png" in found[1]
    assert "other.png was replaced by another picture" in found[2]


@pytest.mark.parametrize("decodes", [True, False])
def test_pictures_that_were_never_decoded_are_decoded_when_they_are_first_used(tmp_path: Path, decodes: bool) -> None:
    row = Prompt("1", "t", (), (damaged(tmp_path),))
    assert bool(PictureWatch(decodes).unreadable([row])) == decodes
