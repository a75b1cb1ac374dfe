"""What waits for what: a run's timeline.json in Chrome's trace format, for ui.perfetto.dev or chrome://tracing."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Span = tuple[str, float, float]  # name, first and last moment in seconds since 1970


class Worker(Protocol):
    """A process that remembers what it did (rl.actors.Worker)."""

    def spans(self) -> Any: ...


class Timeline:
    """Appends events to one file, which is complete JSON after every `write`.

    Args:
        path: the file; one that exists is continued.
        workers: by the name that they have in the drawing.
    """

    def __init__(self, path: Path, workers: Mapping[str, Worker]) -> None:
        self._path, self._workers = path, dict(workers)
        self._own: list[tuple[str, Span]] = []
        self._asked: dict[str, Any] = {}
        self._named: set[str] = set()

    def add(self, process: str, name: str, start: float, end: float) -> None:
        """Something this process did or waited for, under the name of one of its threads."""
        self._own.append((process, (name, start, end)))

    def replaced(self, name: str, worker: Worker) -> None:
        """Another process goes on in this one's lane; what it has not told is lost."""
        self._workers[name] = worker
        self._asked.pop(name, None)

    def write(self, *, busy: Iterable[str] = ()) -> None:
        """Append what has been done since the last call. Workers in `busy` may be in the middle of something: they
        are asked, but their answer is read the next time, so that nobody waits for it."""
        self._asked |= {name: worker.spans() for name, worker in self._workers.items() if name not in self._asked}
        spans, self._own = self._own, []
        for name in [name for name in self._asked if name not in set(busy)]:
            spans += [(name, span) for span in self._asked.pop(name).result()]
        events: list[dict[str, Any]] = []
        for process, (name, start, end) in spans:
            if process not in self._named:
                self._named.add(process)
                events.append(_event("M", process, "process_name", args={"name": process}))
            events.append(_event("X", process, name, ts=round(start * 1e6), dur=round((end - start) * 1e6)))
        _append(self._path, events)


def _event(kind: str, process: str, name: str, **more: Any) -> dict[str, Any]:
    """The process's number comes from its name, so that a resumed run goes on in the same lane."""
    return {"ph": kind, "pid": zlib.crc32(process.encode()) >> 1, "tid": 0, "name": name, **more}


def _append(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Add to a JSON list in a file, without reading it."""
    if not events:
        return
    if not path.exists():
        path.write_text("[]")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        first = file.tell() == 1
        lines = ",\n".join(map(json.dumps, events))
        file.write(("" if first else ",\n").encode() + lines.encode() + b"]")
