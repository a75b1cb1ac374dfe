"""The report of a curation: row counts before and after each filter, acceptance rates, and reasons for dropped rows.

Tested in tests/stages/curation/test_report.py.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from rewards.text import visible

EXAMPLES = 3  # number of example rows for each reason
BARS = 12  # number of equal-width bars in a histogram; the bars `none` and `all` are not counted
WIDTH = 40  # length of a histogram's longest bar, in characters
PAGE = Path(__file__).with_suffix(".jinja")  # the template of the HTML page


@dataclass(frozen=True)
class FilterCount:
    """The number of rows before and after a filter."""

    filter: str
    source: str  # "" for all sources together
    before: int
    after: int


@dataclass(frozen=True)
class DropReason:
    """A reason why a filter dropped rows, with examples."""

    filter: str
    why: str
    count: int
    examples: tuple[tuple[str, str, str], ...]  # row id, detail, question


@dataclass(frozen=True)
class Histogram:
    """A histogram of rows by the share of accepted responses. The first bar counts the rows with share 0. The last bar
    counts the rows with share 1. The other bars have equal width and count all other rows."""

    filter: str
    bars: tuple[tuple[str, int], ...]

    @property
    def widest(self) -> int:
        return max((count for _, count in self.bars), default=0) or 1


@dataclass(frozen=True)
class CurationReport:
    """The contents of a report: numbers and example rows."""

    rows: int
    kept: int
    counts: tuple[FilterCount, ...]
    histograms: tuple[Histogram, ...]
    reasons: tuple[DropReason, ...]

    def text(self) -> str:
        """Returns the report as text for a terminal."""
        lines = [f"{self.kept} of {self.rows} rows are kept"]
        for one in self.counts:
            lines.append(f"  {one.filter:<16}{one.before:>8} -> {one.after:<8}{one.source}")
        for histogram in self.histograms:
            lines += ["", f"accepted responses per row ({histogram.filter})"]
            bars = [(name, count, "#" * round(WIDTH * count / histogram.widest)) for name, count in histogram.bars]
            lines += [f"  {name:>10} {count:>7} {bar}" for name, count, bar in bars]
        for reason in self.reasons:
            lines += ["", f"{reason.filter}: {reason.why} ({reason.count})"]
            lines += [f"  {row}: {' | '.join(filter(None, (detail, shown)))}" for row, detail, shown in reason.examples]
        return visible("\n".join(lines))  # a row can contain characters that control a terminal

    def html(self) -> str:
        """Returns the report as one HTML page. The page needs no other file."""
        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE.read_text())
        return page.render(report=self)


def make_report(decisions: Sequence[Path], filters: Sequence[str], sources: Sequence[str]) -> CurationReport:
    """Makes the report from the decisions about the rows of all blocks.

    Args:
        decisions: the decision files of all blocks.
        filters: the names of the applied filters, in order.
        sources: the paths in data.train, in order.
    """
    rows = [json.loads(line) for path in decisions for line in path.read_bytes().split(b"\n") if line]
    counts = []
    for place, name in enumerate(filters):
        before = [row for row in rows if row["dropped"] is None or row["filter"] in filters[place:]]
        after = [row for row in before if row["filter"] != name]
        counts.append(FilterCount(name, "", len(before), len(after)))
        if len(sources) > 1:
            by_source = [Counter(row["source"] for row in some) for some in (before, after)]
            counts += [FilterCount(name, source, by_source[0][source], by_source[1][source]) for source in sources]
    return CurationReport(
        rows=len(rows),
        kept=sum(row["dropped"] is None for row in rows),
        counts=tuple(counts),
        histograms=tuple(_histogram(name, rows) for name in filters if name in ("difficulty", "synthesis")),
        reasons=tuple(_reasons(rows, filters)),
    )


def _reasons(rows: Sequence[dict[str, Any]], filters: Sequence[str]) -> list[DropReason]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["dropped"] is not None:
            found.setdefault((row["filter"], row["dropped"]), []).append(row)
    ordered = sorted(found.items(), key=lambda item: (filters.index(item[0][0]), -len(item[1])))
    return [
        DropReason(name, why, len(some), tuple((r["id"], r["detail"], r["question"]) for r in some[:EXAMPLES]))
        for (name, why), some in ordered
    ]


def _histogram(name: str, rows: Sequence[dict[str, Any]]) -> Histogram:
    shares = [(note["accepted"], note["of"]) for row in rows if (note := row["curation"].get(name))]
    between = Counter(-(-BARS * right // of) for right, of in shares if 0 < right < of)  # rounded up
    bars = [("none", sum(right == 0 for right, _ in shares))]
    bars += [(f"to {100 * bar // BARS}%", between[bar]) for bar in range(1, BARS + 1)]
    return Histogram(name, (*bars, ("all", sum(right == of for right, of in shares))))
