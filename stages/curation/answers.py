"""What has been asked and answered so far, on disk as it comes, so that a killed run asks nothing twice."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rl.record.disk import to_disk, writing

Key = tuple[str, str, int]  # kind of answer, row id, number


class Answers:
    """One file of JSON lines {kind, id, n, ...}, to which any thread may add. A last line cut by a crash is dropped."""

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

    def get(self, kind: str, identity: str, number: int) -> Mapping[str, Any] | None:
        """An answer, if there is one."""
        return self.known.get((kind, identity, number))

    def put(self, kind: str, identity: str, number: int, record: Mapping[str, Any]) -> None:
        """Remember an answer. Raises Stop if it cannot be written."""
        line = json.dumps({"kind": kind, "id": identity, "n": number, **record}).encode() + b"\n"
        with self._lock:
            if self._file.closed or self.known.get((kind, identity, number)) == record:
                return  # nobody waits for it any more, or it is known
            with writing(self.path):
                self._file.write(line)
                self._file.flush()
            self.known[kind, identity, number] = record
