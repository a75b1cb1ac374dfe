"""Draws the learning curve of a run folder: `python tools/plot_run.py RUN_DIR OUT.svg`.

There is one panel for each task. Points are the training reward of every iteration, the line is the moving average of
the points, and diamonds are the reward on held-out rows. If two runs have the same metrics, their SVG files have the
same bytes. All colours are readable on a white and on a black background.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

COLUMNS, WIDTH, HEIGHT = 3, 2.9, 1.8  # panels in a row; width and height of a panel in inches
LENGTH = "response/tokens_mean/"  # each task has one metric with this prefix, and no other metric has it
WINDOW = 4  # number of iterations before and after a point in the moving average
BLUE, LIGHT_BLUE, ORANGE, GREY = "#3a86d8", "#85b5e8", "#d9730d", "#787878"
STYLE = {
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], GREY),
    **{"axes.titleweight": "bold", "axes.titlesize": 10, "font.size": 9},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": GREY, "grid.alpha": 0.3, "axes.spines.left": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "ytick.left": False, "savefig.transparent": True},
    **{"svg.fonttype": "none", "svg.hashsalt": "learning curve", "font.sans-serif": ["DejaVu Sans", "sans-serif"]},
}


def main(arguments: Sequence[str]) -> int:
    """Draws RUN_DIR/metrics.jsonl to OUT.svg and returns 0. If the arguments or the run folder are wrong, prints a
    message and returns 2."""
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
    with rc_context(STYLE):
        drawing(lines).savefig(arguments[1], format="svg", metadata={"Date": None})
    return 0


def drawing(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the metrics of one stage, with one panel per task. The legend fills one more panel."""
    tasks = sorted(name.removeprefix(LENGTH) for name in set().union(*lines) if name.startswith(LENGTH))
    rows = 1 + len(tasks) // COLUMNS
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    marks = {"mew": 0, "clip_on": False}
    for panel, task in zip(panels, tasks, strict=False):
        iterations, rewards = curve(lines, f"reward/{task}")
        evaluated, held_out = curve(lines, f"eval/{task}")
        panel.plot(iterations, rewards, ".", color=LIGHT_BLUE, label="training, each iteration", **marks)
        panel.plot(iterations, moving_average(rewards, WINDOW), color=BLUE, lw=2, label="training, moving average")
        panel.plot(evaluated, held_out, "D", color=ORANGE, ms=5, label="held-out rows, greedy", **marks)
        change = f": {held_out[0]:.2f} → {held_out[-1]:.2f}" if held_out else ""
        panel.set_title(task + change, loc="left")
        panel.set_ylim(min(0, *rewards), max(1, *rewards))
        panel.locator_params(nbins=4)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    panels[len(tasks)].legend(handles, labels, title="reward over iterations", loc="center", frameon=False)
    return figure


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the iterations that have this metric, and the values of the metric."""
    found = [line for line in lines if name in line]
    return [line["iteration"] for line in found], [line[name] for line in found]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Returns the moving average: for each value, the mean of this value and of up to `window` values on either
    side."""
    around = (values[max(0, place - window) : place + window + 1] for place in range(len(values)))
    return [sum(near) / len(near) for near in around]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
