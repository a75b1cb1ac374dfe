"""Writes timeline.json in Chrome's trace format. It shows what each process of a run did, and when.

ui.perfetto.dev and chrome://tracing display the file.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rl.record.disk import write_file, writing

Span = tuple[str, float, float]  # name, start and end in seconds since 1970


class SpanSource(Protocol):
    """A process that records its work as spans. `spans()` returns a future of the spans that were recorded since
    the previous call."""

    def spans(self) -> Any: ...


class Timeline:
    """Appends events to one file. The file is valid JSON after every `write`. If a crash has cut the file, the complete
    events in it are kept.

    Args:
        path: the file; events are appended if it exists.
        sources: name of a process in the timeline -> the process.
    """

    def __init__(self, path: Path, sources: Mapping[str, SpanSource]) -> None:
        self._path, self._sources = path, dict(sources)
        _repair(path)
        self._own: list[tuple[str, Span]] = []
        self._pending: dict[str, Any] = {}  # name -> future of spans that were not read yet
        self._named: set[str] = set()

    def add(self, process: str, name: str, start: float, end: float) -> None:
        """Records a span of a thread of this process. `process` is the name of the thread. `name` says what the thread
        did, or waited for, from `start` to `end`."""
        self._own.append((process, (name, start, end)))

    def replaced(self, name: str, source: SpanSource) -> None:
        """From now on, `name` stands for the new process `source`. The spans that were not yet read from the old
        process are lost."""
        self._sources[name] = source
        self._pending.pop(name, None)

    def write(self, *, busy: Iterable[str] = ()) -> None:
        """Appends the spans that were recorded since the previous call.

        The processes named in `busy` may be inside a long call. Their spans are requested now and read by a later
        `write`, so that this `write` does not wait for these processes.
        """
        self._pending |= {name: source.spans() for name, source in self._sources.items() if name not in self._pending}
        spans, self._own = self._own, []
        for name in [name for name in self._pending if name not in set(busy)]:
            spans += [(name, span) for span in self._pending.pop(name).result()]
        events: list[dict[str, Any]] = []
        for process, (name, start, end) in spans:
            if process not in self._named:
                self._named.add(process)
                events.append(_event("M", process, "process_name", args={"name": process}))
            events.append(_event("X", process, name, ts=round(start * 1e6), dur=round((end - start) * 1e6)))
        _append(self._path, events)


def _event(kind: str, process: str, name: str, **more: Any) -> dict[str, Any]:
    """Returns one event. The process id in the event is a hash of the process name. After a resume, a process therefore
    keeps its line in the timeline."""
    return {"ph": kind, "pid": zlib.crc32(process.encode()) >> 1, "tid": 0, "name": name, **more}


def _repair(path: Path) -> None:
    """Replaces a file that is no JSON list as `_append` writes it by a file with its complete events. Each event has a
    line of its own."""
    text = path.read_text(errors="replace") if path.exists() else "[]"
    try:
        events = json.loads(text)
    except (ValueError, RecursionError):
        events = None
    if not (isinstance(events, list) and text.endswith("]" if events else "[]")):
        lines = (line.removeprefix("[").removesuffix("]").removesuffix(",") for line in text.splitlines())
        complete = ",\n".join(filter(_is_event, lines))
        write_file(path, f"[{complete}]".encode())


def _is_event(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _append(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Appends events to the JSON list in a file, without reading the file."""
    if not events:
        return
    if not path.exists():
        write_file(path, b"[]")
    with writing(path), path.open("r+b") as file:
        file.seek(-1, 2)
        first = file.tell() == 1
        lines = ",\n".join(map(json.dumps, events))
        file.write(("" if first else ",\n").encode() + lines.encode() + b"]")
