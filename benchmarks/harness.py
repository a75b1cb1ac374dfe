"""Code that all benchmarks use. It registers benchmarks, saves their results, and measures our code and the code that
it is compared with, alternately."""

import importlib
import inspect
import json
import os
import pkgutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
RESULTS = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True)
class Result:
    """The result of one benchmark. `more` has further fields for the results file, for example "goal", a text that
    states the goal."""

    ours_s: float  # seconds of our side; CPU seconds if the benchmark says so
    other_s: float  # seconds of the other side, with which our side is compared
    ratio: float  # other_s / ours_s, unless the benchmark says otherwise
    ceiling: float | None = None  # the limit or goal of the ratio
    max_abs_diff: float = 0.0  # largest difference between the results of both sides
    more: Mapping[str, Any] = field(default_factory=dict)

    def record(self, name: str) -> dict[str, Any]:
        """Returns the fields of one line of the results file."""
        values = {**vars(self), **self.more}
        return {"name": name, **{key: rounded(value) for key, value in values.items() if key != "more"}}


Entry = Callable[[], Result]
_ENTRIES: dict[str, Entry] = {}


def benchmark(name: str) -> Callable[[Entry], Entry]:
    """Registers a function as the benchmark `name`. The docstring of the function says what is compared and what the
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
    """Imports every file of this package and returns all registered benchmarks, sorted by name."""
    package = importlib.import_module(__package__ or "benchmarks")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_ENTRIES.items()))


def interleaved(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Calls `ours` and `other` alternately, `repeats` times each. Each call returns a time in seconds. Returns the
    median time of `ours` and the median time of `other`. In every second turn, `other` is called first, so that the
    load from other programs affects both sides."""
    took: dict[Callable[[], float], list[float]] = {ours: [], other: []}
    for turn in range(repeats):
        for side in (ours, other) if turn % 2 == 0 else (other, ours):
            took[side].append(side())
    return statistics.median(took[ours]), statistics.median(took[other])


@contextmanager
def busy_process() -> Iterator[None]:
    """Runs another process that computes without pause on one core during the `with` block. The process also ends if
    this process is killed."""
    process = subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def max_abs_diff(ours: Sequence[float], other: Sequence[float]) -> float:
    """Returns the largest absolute difference between two lists of results."""
    return max((abs(a - b) for a, b in zip(ours, other, strict=True)), default=0.0)


def rounded(value: Any) -> Any:
    """Rounds a float to four significant digits; returns anything else unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def save(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes the records to the results file, which is sorted by name. The lines of all other benchmarks do not
    change."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {line["name"]: line for line in map(json.loads, filter(str.strip, lines))}
    known |= {record["name"]: record for record in records}
    path.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Formats the records as a text table with one line per record."""
    heads = ("name", "ours_s", "other_s", "ratio", "ceiling", "max_abs_diff")
    rows = [heads, *(["-" if record[head] is None else str(record[head]) for head in heads] for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    )
    return "\n".join("  ".join(cells) for cells in aligned)
