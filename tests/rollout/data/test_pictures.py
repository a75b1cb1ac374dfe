"""Tests that the pictures of rows are decoded once, and that the result is remembered."""

from pathlib import Path

import pytest

from rl.pixels import TURNED
from rl.types import Picture
from rollout.data import pictures
from rollout.data.pictures import decode_all
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
