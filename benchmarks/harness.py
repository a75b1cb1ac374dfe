"""What every benchmark shares: a registry, fair repeats, and the record of a result."""

import importlib
import inspect
import json
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True)
class Result:
    """What one entry measured. `more` holds further keys of its record, such as the "goal" in words."""

    ours_s: float  # seconds, or CPU seconds where the entry says so
    other_s: float  # likewise, of what it is compared with
    ratio: float  # other_s / ours_s, unless the entry says otherwise
    ceiling: float | None = None  # the limit that the ratio is judged against
    max_abs_diff: float = 0.0  # between the results of both sides
    more: Mapping[str, Any] = field(default_factory=dict)

    def record(self, name: str) -> dict[str, Any]:
        """A line of the results file."""
        return {
            "name": name,
            "ours_s": rounded(self.ours_s),
            "other_s": rounded(self.other_s),
            "ratio": rounded(self.ratio),
            "ceiling": rounded(self.ceiling),
            "max_abs_diff": rounded(self.max_abs_diff),
            **{key: rounded(value) for key, value in self.more.items()},
        }


Entry = Callable[[], Result]
_ENTRIES: dict[str, Entry] = {}


def benchmark(name: str) -> Callable[[Entry], Entry]:
    """Registers an entry, named "file/what" or after its file. Its docstring says what is compared and how the ratio
    reads."""

    def register(entry: Entry) -> Entry:
        if name in _ENTRIES and inspect.getsourcefile(_ENTRIES[name]) != inspect.getsourcefile(entry):
            raise ValueError(f"two benchmarks are called {name!r}")
        if not entry.__doc__:
            raise ValueError(f"benchmark {name!r} has no docstring")
        _ENTRIES[name] = entry
        return entry

    return register


def entries() -> dict[str, Entry]:
    """All entries by name, in order of name; imports every file of this package."""
    package = importlib.import_module(__package__ or "benchmarks")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_ENTRIES.items()))


def interleaved(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of what both sides say they took. They take turns, and take turns at being first, so that whatever
    else the machine does meets both alike."""
    took: dict[Callable[[], float], list[float]] = {ours: [], other: []}
    for turn in range(repeats):
        for side in (ours, other) if turn % 2 == 0 else (other, ours):
            took[side].append(side())
    return statistics.median(took[ours]), statistics.median(took[other])


def max_abs_diff(ours: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between two lists of results."""
    return max((abs(a - b) for a, b in zip(ours, other, strict=True)), default=0.0)


def rounded(value: Any) -> Any:
    """A number to four significant digits, anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def save(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Rewrites the results file, in order of name; entries that are not among `records` keep their lines."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {line["name"]: line for line in map(json.loads, filter(str.strip, lines))}
    known |= {record["name"]: record for record in records}
    path.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as text, one line each."""
    heads = ("name", "ours_s", "other_s", "ratio", "ceiling", "max_abs_diff")
    rows = [heads, *(["-" if record[head] is None else str(record[head]) for head in heads] for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    )
    return "\n".join("  ".join(cells) for cells in aligned)
