"""Data rows, pictures and the files that hold them, for tests that read data."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rl.config import Source
from rl.types import Prompt
from rollout.data.errors import RowError
from rollout.data.rows import read

CHAT = [{"role": "user", "content": "1 + 1?"}]


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "task": "sums", "messages": CHAT, "ground_truth": 2} | changes


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def png(size: tuple[int, int] = (3, 2), color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(folder: Path, *rows: Any) -> Path:
    """Writes rows, or lines that are given as str."""
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def json_array(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def read_rows(source: str | Path | Sequence[str | Path], **options: Any) -> list[Prompt]:
    """Reads the rows of one or more paths, with the options of `read`. Raises RowError if a row cannot be used."""
    paths = [source] if isinstance(source, (str, Path)) else source
    return list(read([Source(path=str(path)) for path in paths], **options).checked().prompts)


def only_prompt(path: Path, **options: Any) -> Prompt:
    """The prompt of a file with one row, read with these options of its source."""
    rows = read([Source(path=str(path), **options)])
    assert rows.bad == () and len(rows.prompts) == 1, rows.bad
    return rows.prompts[0]


def reasons(path: Path, **options: Any) -> list[str]:
    """Why the rows of a file cannot be used."""
    with pytest.raises(RowError) as caught:
        read_rows(path, **options)
    return [bad.reason for bad in caught.value.bad]


def sums(folder: Path, name: str, count: int, **changes: Any) -> Path:
    """Writes arithmetic rows with the ids NAME0, NAME1, ..."""
    path = folder / f"{name}.jsonl"
    lines = (row(id=f"{name}{n}", task="arithmetic", ground_truth="2", **changes) for n in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
