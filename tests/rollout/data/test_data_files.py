"""Tests which files and data sets can be read, and the errors for all other files and data sets."""

from pathlib import Path

import pytest

from rl.config import Source
from rollout.data import data_files
from rollout.data.rows import read
from tests.support.data_rows import jsonl, parquet, png, read_rows, reasons, row


def test_a_hugging_face_folder_gives_the_same_prompts_as_a_file_with_its_rows(tmp_path: Path) -> None:
    import datasets

    rows = [row(id=str(n), messages=[{"role": "user", "content": "<image>?"}], images=[png()]) for n in range(3)]
    saved = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict({"held_out": saved}).save_to_disk(tmp_path / "set")
    assert read_rows(f"{tmp_path}/set:held_out") == read_rows(parquet(tmp_path, *rows))
    with pytest.raises(ValueError, match="no split 'train'"):
        read_rows(tmp_path / "set")


def test_text_that_is_not_utf_8_is_a_bad_row_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    assert reasons(path) == ["not UTF-8: invalid start byte at byte 8"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("no_folder", None, "does not exist"),
        ("rows.csv", b"a,b", "of an unknown kind; give a .jsonl"),
        ("rows.jsonl", b"\n", "has no rows"),
        ("rows.parquet", b"PAR?", "not a readable Parquet file"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08", "damaged gzip file"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_streaming_is_refused_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="streaming is only for data sets"):
        read([Source(path=str(jsonl(tmp_path, row())), streaming=True)])


def test_a_streamed_data_set_gives_the_same_rows_and_pictures(tmp_path: Path) -> None:
    pictures = [{"bytes": png(color=color), "path": None} for color in ("red", "blue")]
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set", *(row(id=f"r{n}", messages="?", images=[one]) for n, one in enumerate(pictures)))
    whole, streamed = (
        read([Source(path=str(tmp_path / "set"), streaming=streaming)]).prompts for streaming in (False, True)
    )
    assert streamed == whole and len(whole) == 2


def test_a_json_file_that_is_not_an_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"rows.json contains dict instead of an array"):
        read_rows(tmp_path / "rows.json")


def test_rows_of_a_local_copy_of_a_hub_data_set_use_the_pictures_that_it_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--a--b/snapshots/1f", tmp_path / "datasets--a--b/blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "77").write_bytes(png())
    (snapshot / "images/a.png").symlink_to("../../../blobs/77")
    jsonl(blobs, row(messages="<image>?", images=["images/a.png"])).rename(blobs / "88")
    (snapshot / "rows.jsonl").symlink_to("../../blobs/88")
    assert [prompt.images[0].size for prompt in read_rows(snapshot / "rows.jsonl")] == [(3, 2)]


def test_rows_from_the_hub_contain_their_pictures_or_name_files_of_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    cache = tmp_path / "cache"
    cache.mkdir()
    for folder in (tmp_path, cache):
        (folder / "a.png").write_bytes(png())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    images = [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": str(cache / "a.png")}]
    images += [{"bytes": None, "path": path} for path in (str(tmp_path / "a.png"), "a.png", "../a.png")]
    stored = datasets.Dataset.from_list(
        [row(id=f"r{n}", messages="<image>?", images=[one]) for n, one in enumerate(images)]
    )
    monkeypatch.setattr(data_files, "_load_dataset", lambda name, split, streaming: stored)
    monkeypatch.chdir(tmp_path)
    rows = read([Source(path="owner/name")])
    assert [prompt.id for prompt in rows.prompts] == ["r0", "r1"]
    outside, relative, above = (bad.reason for bad in rows.bad)
    assert "is outside of the data's folder" in outside
    assert "'a.png' is a path, but rows from the hub must contain their pictures" in relative and "../a.png" in above
