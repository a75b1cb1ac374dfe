"""The report of a curation: row counts before and after each filter, acceptance rates, and reasons for dropped rows.

Tested in tests/stages/curation/test_filters.py.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

EXAMPLES = 3  # number of example rows for each reason
BARS = 12  # number of bars in a histogram, besides the bars `none` and `all`
WIDTH = 40  # length of a histogram's longest bar, in characters


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
    """Counts rows by their share of accepted responses: one bar for none, one for all, equal-width bars in between."""

    filter: str
    bars: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CurationReport:
    """The numbers and example rows of a report."""

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
            most = max((count for _, count in histogram.bars), default=0) or 1
            lines += [f"  {name:>10} {count:>7} {'#' * round(WIDTH * count / most)}" for name, count in histogram.bars]
        for reason in self.reasons:
            lines += ["", f"{reason.filter}: {reason.why} ({reason.count})"]
            lines += [f"  {row}: {' | '.join(filter(None, (detail, shown)))}" for row, detail, shown in reason.examples]
        return "\n".join(lines)

    def html(self) -> str:
        """Returns the report as one HTML page that loads no other file."""
        return _PAGE.render(report=self, widest=lambda histogram: max((n for _, n in histogram.bars), default=0) or 1)


def make_report(decisions: Sequence[Path], filters: Sequence[str], sources: Sequence[str]) -> CurationReport:
    """Makes the report from the decisions about all blocks.

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


_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Curation: {{ report.kept }} of {{ report.rows }} rows</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
td, th { padding: 0.15rem 0.8rem 0.15rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 24rem; }
td.bar div { background: #4a7ab5; height: 0.9rem; }
tr.all td { border-top: 1px solid #ccc; font-weight: 600; }
code { color: #555; }
</style>
</head>
<body>
<h1>{{ report.kept }} of {{ report.rows }} rows are kept</h1>
<table>
<tr><th>filter</th><th>source</th><th class="number">in</th><th class="number">out</th></tr>
{% for one in report.counts %}
<tr{% if not one.source %} class="all"{% endif %}><td>{{ one.filter if not one.source }}</td>\
<td>{{ one.source or "all" }}</td>\
<td class="number">{{ one.before }}</td><td class="number">{{ one.after }}</td></tr>
{% endfor %}
</table>
{% for histogram in report.histograms %}
<h2>Accepted responses per row: {{ histogram.filter }}</h2>
<table>
{% for name, count in histogram.bars %}
<tr><td>{{ name }}</td><td class="number">{{ count }}</td>\
<td class="bar"><div style="width: {{ 100 * count / widest(histogram) }}%"></div></td></tr>
{% endfor %}
</table>
{% endfor %}
{% if report.reasons %}
<h2>Why rows were dropped</h2>
{% for reason in report.reasons %}
<h3>{{ reason.filter }}: {{ reason.why }} ({{ reason.count }})</h3>
<table>
{% for row, detail, question in reason.examples %}
<tr><td><code>{{ row }}</code></td><td>{{ detail }}</td><td>{{ question }}</td></tr>
{% endfor %}
</table>
{% endfor %}
{% endif %}
</body>
</html>
""")
