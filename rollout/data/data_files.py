"""Reads JSONL, JSON and Parquet files and Hugging Face datasets into raw rows, each with its file and line."""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN = "give a .jsonl, .jsonl.gz, .json or .parquet file, or a Hugging Face dataset (folder or id, then :SPLIT)"


@dataclass(frozen=True)
class RawRow:
    """A row as it is stored. If a row cannot be parsed, `values` is None and `problem` says why."""

    file: str
    line: int  # in a JSONL file: number of the line; in other sources: number of the row; both counted from 1
    base: Path | None  # the folder that relative paths in the row start from; None for rows from the hub
    values: Mapping[str, Any] | None
    problem: str = ""
    folders: tuple[Path, ...] = ()  # more folders of the data, in which its pictures may be


def raw_rows(source: str, *, streaming: bool = False) -> Iterator[RawRow]:
    """Yields the rows of one file or dataset, as they are stored.

    Args:
        streaming: if True, each row of a dataset is downloaded when it is read, and no copy is stored on disk.
    Raises: ValueError if the file or dataset cannot be read at all.
    """
    path = Path(source)
    if streaming and path.is_file():
        raise ValueError(f"{path} is a file, but streaming is only for data sets; leave out streaming")
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl(path)
    if path.is_file() and path.suffix == ".json":
        return _json(path)
    if path.is_file() and path.suffix == ".parquet":
        return _parquet(path)
    if path.is_file():
        raise ValueError(f"{path} is of an unknown kind; {KNOWN}")
    if shards := _shards(path):
        return (row for shard in shards for row in _jsonl(shard))
    folder = Path(source.partition(":")[0])
    no_hub_id = folder.is_absolute() or len(folder.parts) > 2
    if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet", ".json")) or (no_hub_id and not folder.is_dir()):
        raise ValueError(f"{path} does not exist; {KNOWN}")
    return _dataset(source, streaming)


def hub_blobs(path: Path) -> tuple[Path, ...]:
    """Returns the folder of the files to which the links in a local copy of a hub data set point, or () if the path is
    in no such copy. In a copy, all files are links from snapshots/REVISION/ to blobs/."""
    copies = [parent.parent for parent in path.absolute().parents if parent.name == "snapshots"]
    return tuple(copy / "blobs" for copy in copies[:1] if (copy / "blobs").is_dir())


def _jsonl(path: Path) -> Iterator[RawRow]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    values, problem = _json_row(line)
                    yield RawRow(str(path), number, path.parent, values, problem, hub_blobs(path))
        except (EOFError, gzip.BadGzipFile) as problem:
            raise ValueError(f"{path} is a damaged gzip file: {problem}") from problem


def _json_row(line: bytes) -> tuple[Mapping[str, Any] | None, str]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        return None, f"not UTF-8: {problem.reason} at byte {problem.start}"
    except (ValueError, RecursionError) as problem:
        return None, f"not JSON: {problem}"
    if not isinstance(row, dict):
        return None, f"a row must be a JSON object, but is {type(row).__name__}"
    return row, ""


def _shards(path: Path) -> list[Path]:
    """Returns the files of a folder that `python -m stages.curate` wrote. The names of such files are numbers. For any
    other path, the result is [], and the caller tries to read the path as a data set."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    return files if all(file.stem.isdigit() for file in files) else []


def _json(path: Path) -> Iterator[RawRow]:
    """Yields the rows of one JSON array. If a row is an array, its columns are named "0", "1", and so on."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from problem
    if not isinstance(rows, list):
        raise ValueError(f"{path} contains {type(rows).__name__} instead of an array of rows")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, list):
            row = {str(place): value for place, value in enumerate(row)}
        problem = "" if isinstance(row, dict) else f"a row must be a JSON object, but is {type(row).__name__}"
        yield RawRow(str(path), number, path.parent, None if problem else row, problem, hub_blobs(path))


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, path.parent, values, folders=hub_blobs(path))
    except pyarrow.ArrowException as problem:
        raise ValueError(f"{path} is not a readable Parquet file: {problem}") from problem


def _dataset(source: str, streaming: bool) -> Iterator[RawRow]:
    """Yields the rows of a Hugging Face dataset. Pictures are not decoded."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    name, _, split = source.partition(":")
    dataset = _load_dataset(name, split or "train", streaming)
    base = Path(name) if Path(name).is_dir() else None
    # The library stores the pictures of some data sets as files in its caches.
    caches = (Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE))
    number = 0
    for batch in dataset.with_format("arrow").iter(batch_size=256):
        for values in batch.to_pylist():
            number += 1
            yield RawRow(source, number, base, values, folders=caches)


def _load_dataset(name: str, split: str, streaming: bool) -> Any:
    import datasets
    import datasets.exceptions

    try:
        if any((Path(name) / kind).exists() for kind in ("dataset_dict.json", "state.json")):
            if streaming:
                raise ValueError("a dataset that save_to_disk wrote cannot be streamed; leave out streaming")
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except KeyError as problem:
        raise ValueError(f"dataset {name} has no split {problem}; write {name}:SPLIT") from problem
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise ValueError(f"cannot load {name} (split {split}): {problem}; {KNOWN}") from problem
