"""Draws the learning curve of a run folder: `python tools/plot_run.py RUN_DIR OUT.svg`.

There is one panel for each task. Points are the training reward of every iteration, the line is the moving average of
the points, and diamonds are the reward on held-out rows. The same metrics give a file with the same bytes. All colours
can be read on white and on black.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

COLUMNS, WIDTH, HEIGHT = 3, 216, 116  # panels in a row; width and height of a panel in pixels
LEFT, TOP, RIGHT, BOTTOM = 40, 30, 20, 26  # space around each panel in pixels
LENGTH = "response/tokens_mean/"  # prefix of a metric that exists for every task, and only for tasks
WINDOW = 4  # number of iterations before and after a point in the moving average
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #787878 }
.title { font-weight: 600; font-size: 13px }
.axis { stroke: #787878; stroke-opacity: .45 }
.points { fill: #3a86d8; fill-opacity: .5 }
.line { stroke: #3a86d8; stroke-width: 2.2; stroke-linejoin: round; fill: none }
.held-out { fill: #d9730d }
"""


def main(arguments: Sequence[str]) -> int:
    """Draws RUN_DIR/metrics.jsonl to OUT.svg. Returns 0. If this is impossible, prints a message and returns 2."""
    if len(arguments) != 2:
        print("usage: python tools/plot_run.py RUN_DIR OUT.svg", file=sys.stderr)
        return 2
    file = Path(arguments[0]) / "metrics.jsonl"
    if not file.is_file():
        print(f"{arguments[0]} is no run folder: it has no metrics.jsonl", file=sys.stderr)
        return 2
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if len({line["stage"] for line in lines}) > 1:
        print(f"{arguments[0]} has several stages; give the folder of one stage", file=sys.stderr)
        return 2
    Path(arguments[1]).write_text(drawing(lines), encoding="utf-8")
    return 0


def drawing(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the SVG text for the metrics of one stage."""
    names = {name for line in lines for name in line}
    tasks = sorted(name.removeprefix(LENGTH) for name in names if name.startswith(LENGTH))
    cells = [_panel(task, lines) for task in tasks] + [_legend()]
    across, down = WIDTH + LEFT + RIGHT, HEIGHT + TOP + BOTTOM
    parts = [
        f'<g transform="translate({place % COLUMNS * across + LEFT} {place // COLUMNS * down + TOP})">\n{cell}</g>\n'
        for place, cell in enumerate(cells)
    ]
    size = f"{COLUMNS * across} {-(-len(cells) // COLUMNS) * down}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">\n'
        f"<title>Reward of each task over the iterations of a run</title>\n<style>{STYLE}</style>\n"
        f"{''.join(parts)}</svg>\n"
    )


def _panel(task: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the SVG of one task: title, axes, points, line and diamonds."""
    last = max(1, *(line["iteration"] for line in lines))
    training = [(line["iteration"], line[f"reward/{task}"]) for line in lines if f"reward/{task}" in line]
    held_out = [(line["iteration"], line[f"eval/{task}"]) for line in lines if f"eval/{task}" in line]

    iterations, rewards = zip(*training, strict=True)
    low, high = min(0, *rewards), max(1, *rewards)

    def at(iteration: float, reward: float) -> tuple[float, float]:
        return round(WIDTH * iteration / last, 1), round(HEIGHT * (high - reward) / (high - low), 1)

    curve = zip(iterations, moving_average(rewards, WINDOW), strict=True)
    points = "".join('<circle cx="{}" cy="{}" r="2"/>'.format(*at(*point)) for point in training)
    diamonds = "".join(_diamond(*at(*point)) for point in held_out)
    path = " ".join("{},{}".format(*at(*point)) for point in curve)
    change = f": {held_out[0][1]:.2f} → {held_out[-1][1]:.2f}" if held_out else ""
    return (
        f'<text class="title" x="0" y="-12">{escape(task)}{change}</text>\n{_axes(last, (low, high), at)}'
        f'<g class="points">{points}</g>\n<polyline class="line" points="{path}"/>\n{diamonds}\n'
    )


def _axes(last: int, span: tuple[float, float], at: Callable[[float, float], tuple[float, float]]) -> str:
    """Returns the SVG of grid lines at the lowest, middle and highest reward, and of the numbers at both axes."""
    parts = []
    for reward in (span[0], sum(span) / 2, span[1]):
        _, y = at(0, reward)
        parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="-10" y="{y + 4}" text-anchor="end">{reward:.3g}</text>')
    for iteration in (0, last // 2, last):
        x, y = at(iteration, 0)
        parts.append(f'<text x="{x}" y="{y + 17}" text-anchor="middle">{iteration}</text>')
    return "".join(parts) + "\n"


def _diamond(x: float, y: float) -> str:
    return f'<path class="held-out" d="M{x} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z"/>'


def _legend() -> str:
    """Returns the SVG of the legend, which takes the place of a panel."""
    rows = (
        ('<line class="line" x1="0" x2="26" y1="-4" y2="-4"/>', f"training, mean of {2 * WINDOW + 1} iterations"),
        ('<g class="points"><circle cx="13" cy="-4" r="2"/></g>', "training, each iteration"),
        (_diamond(13, -4), "held-out rows, greedy"),
        ("", "reward over iterations"),
    )
    return "".join(
        f'<g transform="translate(0 {24 + 24 * row})">{mark}<text x="36" y="0">{text}</text></g>\n'
        for row, (mark, text) in enumerate(rows)
    )


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Returns for each value the mean of the value and up to `window` neighbours on either side."""
    around = (values[max(0, place - window) : place + window + 1] for place in range(len(values)))
    return [sum(near) / len(near) for near in around]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
