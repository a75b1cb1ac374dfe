"""Shared by all benchmarks: the registry, repeats in turns, and the record of a result."""

import importlib
import inspect
import json
import os
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
RESULTS = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True)
class Result:
    """The result of one entry. `more` has further keys of its record, such as "goal", a text."""

    ours_s: float  # seconds, or CPU seconds if the entry says so
    other_s: float  # the same of the other side of the comparison
    ratio: float  # other_s / ours_s, unless the entry says otherwise
    ceiling: float | None = None  # the limit or goal for the ratio
    max_abs_diff: float = 0.0  # between the results of both sides
    more: Mapping[str, Any] = field(default_factory=dict)

    def record(self, name: str) -> dict[str, Any]:
        """Returns a line of the results file."""
        values = {**vars(self), **self.more}
        return {"name": name, **{key: rounded(value) for key, value in values.items() if key != "more"}}


Entry = Callable[[], Result]
_ENTRIES: dict[str, Entry] = {}


def benchmark(name: str) -> Callable[[Entry], Entry]:
    """Registers an entry under the name of its file, or "file/name". Its docstring says what is compared and what the
    ratio means."""

    def register(entry: Entry) -> Entry:
        if name in _ENTRIES and inspect.getsourcefile(_ENTRIES[name]) != inspect.getsourcefile(entry):
            raise ValueError(f"two benchmarks are called {name!r}")
        if not entry.__doc__:
            raise ValueError(f"benchmark {name!r} has no docstring")
        _ENTRIES[name] = entry
        return entry

    return register


def entries() -> dict[str, Entry]:
    """Imports every file of this package; returns all entries, sorted by name."""
    package = importlib.import_module(__package__ or "benchmarks")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_ENTRIES.items()))


def interleaved(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Runs both sides in turns and returns the medians of the seconds that they return. The side that runs first
    alternates, so that other load on the machine affects both."""
    took: dict[Callable[[], float], list[float]] = {ours: [], other: []}
    for turn in range(repeats):
        for side in (ours, other) if turn % 2 == 0 else (other, ours):
            took[side].append(side())
    return statistics.median(took[ours]), statistics.median(took[other])


def max_abs_diff(ours: Sequence[float], other: Sequence[float]) -> float:
    """Returns the largest difference between two lists of results."""
    return max((abs(a - b) for a, b in zip(ours, other, strict=True)), default=0.0)


def rounded(value: Any) -> Any:
    """Rounds a float to four significant digits; returns anything else unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def save(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Rewrites the results file, sorted by name; entries that are not among `records` keep their lines."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {line["name"]: line for line in map(json.loads, filter(str.strip, lines))}
    known |= {record["name"]: record for record in records}
    path.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Formats the records as text, one line each."""
    heads = ("name", "ours_s", "other_s", "ratio", "ceiling", "max_abs_diff")
    rows = [heads, *(["-" if record[head] is None else str(record[head]) for head in heads] for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    )
    return "\n".join("  ".join(cells) for cells in aligned)
