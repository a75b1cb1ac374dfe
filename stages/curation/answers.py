"""Stores every model answer on disk when it arrives. So a curation that is killed and continued asks no model the same
question twice.

Tested in tests/stages/curation/test_run.py.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rl.record.disk import to_disk, writing

Key = tuple[str, str, int]  # kind of answer, row id, number of the answer


class Answers:
    """A file with one JSON line {kind, id, n, ...} per answer. Any thread may add lines. If a crash has left the last
    line incomplete, this line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[Key, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
            for line in whole.splitlines():
                record = json.loads(line)
                self.known[record.pop("kind"), record.pop("id"), record.pop("n")] = record
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(len(whole) + 1 if whole else 0)
            self._file.seek(0, 2)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self.path), self._lock:
            self._file.close()
            to_disk(self.path)

    def get(self, kind: str, row_id: str, number: int) -> Mapping[str, Any] | None:
        """Returns the stored answer, or None if there is none."""
        return self.known.get((kind, row_id, number))

    def put(self, kind: str, row_id: str, number: int, record: Mapping[str, Any]) -> None:
        """Stores an answer. Raises Stop if the file cannot be written."""
        line = json.dumps({"kind": kind, "id": row_id, "n": number, **record}).encode() + b"\n"
        with self._lock:
            if self._file.closed or self.known.get((kind, row_id, number)) == record:
                return  # either the filter has ended, or the answer is stored already
            with writing(self.path):
                self._file.write(line)
                self._file.flush()
            self.known[kind, row_id, number] = record
