"""Shows the progress of a run: a live panel in a terminal, or plain lines in a file or pipe. An error of the display
never ends the run.

The display shows metrics from metrics.jsonl, their moving averages, and the remaining time. rl/record/metrics.yaml
explains the metrics.
"""

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rl.record.metrics import describe

WINDOW = 10  # iterations in a moving average
TREND = 30  # iterations in a sparkline
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=*#"
SHARES = {"rollout": "cyan", "reward": "yellow", "critic": "magenta", "policy": "green", "sync": "blue"}
NARROW = 72  # width in characters; below this width, the table has fewer columns
logger = logging.getLogger(__name__)
P = ParamSpec("P")


class ShownRun(Protocol):
    """The options that the display reads."""

    @property
    def stage(self) -> str: ...
    @property
    def iterations(self) -> int: ...


def _harmless(method: Callable[Concatenate["Display", P], None]) -> Callable[Concatenate["Display", P], None]:
    """Catches any error of a display method and prints one warning, so that a run continues when its terminal is
    gone."""

    @functools.wraps(method)
    def guarded(self: "Display", *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as problem:  # no failure of the display may end the run
            self._stop()
            logger.warning("the progress display failed (%r); the run continues, see metrics.jsonl", problem)

    return guarded


class _Console(Console):
    """A console that prints nothing more after its output pipe was closed (`| head`). rich's own console would end the
    process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Shows one stage of a run.

    A Display is a context manager. At the end of the `with` block it restores the terminal, even after an error:

        with Display(config) as display:
            display.evaluation(metrics_of_iteration_0)
            display.phase("rollout")
            display.iteration(metrics)
        display.summary(first_evaluation, last_evaluation)
    """

    def __init__(self, run: ShownRun, console: Console | None = None) -> None:
        self._run = run
        self._console = console or _Console()
        self._live: Live | None = None
        self._began = time.monotonic()
        self._phase, self._phase_began = "", self._began
        self._seconds: deque[float] = deque(maxlen=WINDOW)  # duration of each iteration that this process ran
        self._history: dict[str, deque[float]] = {}  # reward/* -> recent values
        self._metrics: Mapping[str, Any] = {}
        self._first_held_out: dict[str, float] = {}
        self._held_out: dict[str, float] = {}

    def __enter__(self) -> "Display":
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @_harmless
    def phase(self, name: str) -> None:
        """Shows what the run does from now on, such as "rollout"."""
        self._phase, self._phase_began = name, time.monotonic()

    @_harmless
    def message(self, text: str) -> None:
        """Prints one permanent line, for example after a checkpoint was saved."""
        self._print(Text(text))

    @_harmless
    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a finished iteration."""
        self._metrics = dict(metrics)
        if total := metrics.get("time/total"):
            self._seconds.append(total)
        for name, value in metrics.items():
            if name == "reward/mean" or name in self._task_names():
                self._history.setdefault(name, deque(maxlen=TREND)).append(value)
        if self._live:
            self._live.refresh()
        else:
            self._print(self._line())

    @_harmless
    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics `eval/*`, if there are any. The first evaluation is shown as a table. A later evaluation is
        shown as a line with the changes since the first evaluation."""
        found = families(metrics)
        if not found:
            return
        self._held_out = found
        iteration = metrics.get("iteration", 0)
        if not self._first_held_out:
            self._first_held_out = self._held_out
            self._print(Text(f"held-out reward at iteration {iteration}", style="bold"))
            self._print(_held_out_table(self._held_out))
            return
        now = _with_average(self._held_out)
        parts = [f"{name} {value:.3f}{self._change(name)}" for name, value in now.items()]
        self._print(Text(f"held-out at iteration {iteration}:  " + "  ".join(parts)))

    @_harmless
    def summary(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Shows the held-out reward of each task before and after training. `before` and `after` contain the metrics
        `eval/*` of the two evaluations."""
        self._stop()
        self._print(Text("held-out reward before and after training", style="bold"))
        self._print(_before_after(families(before), families(after)))

    # Terminal

    @_harmless
    def _start(self) -> None:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2)
            self._live.start()

    def _stop(self) -> None:
        """Stops the panel, even after an error. Otherwise the panel would overwrite later output."""
        live, self._live = self._live, None
        try:
            if live:
                live.stop()
        except Exception as problem:  # no failure of the display may end the run
            logger.warning("the progress display did not stop cleanly: %r", problem)

    def _print(self, shown: RenderableType) -> None:
        # In a log file, text is not wrapped. A file has no width, but rich would assume a width.
        self._console.print(shown, soft_wrap=isinstance(shown, Text) and not self._console.is_terminal)

    # Numbers

    def _task_names(self) -> list[str]:
        """Returns the metric name reward/<task> for each task of the last iteration. The tasks are found by their
        metrics response/tokens_mean/<task>."""
        prefix = "response/tokens_mean/"
        return [f"reward/{name.removeprefix(prefix)}" for name in self._metrics if name.startswith(prefix)]

    def _recent(self, name: str) -> list[float]:
        """Returns the last values of a metric: as many as fit beside the other columns of the table."""
        room = max(1, self._console.width - NARROW + 10)
        return list(self._history.get(name, ()))[-room:]

    def _average(self, name: str) -> float | None:
        recent = list(self._history.get(name, ()))[-WINDOW:]
        return sum(recent) / len(recent) if recent else None

    def _left(self) -> float | None:
        """Estimates the remaining seconds from the mean duration of the last iterations. Returns None before the first
        iteration has ended."""
        if not self._seconds:
            return None
        to_go = self._run.iterations - int(self._metrics.get("iteration", 0))
        return to_go * sum(self._seconds) / len(self._seconds)

    def _change(self, family: str) -> str:
        first = _with_average(self._first_held_out).get(family)
        return "" if first is None else f" ({_with_average(self._held_out)[family] - first:+.3f})"

    def _shares(self) -> dict[str, float]:
        """Returns each phase's share of the iteration's time, and the rest as `other`. The shares sum to 1."""
        total = self._metrics.get("time/total", 0)
        if not total:
            return {}
        shares = {name: self._metrics.get(f"time/{name}", 0) / total for name in SHARES}
        return shares | {"other": max(0.0, 1 - sum(shares.values()))}

    # What is shown

    def _line(self) -> Text:
        """Returns the metrics of the last iteration as one plain line."""
        metrics = self._metrics
        parts = [
            f"{self._run.stage} {metrics.get('iteration', 0)}/{self._run.iterations}",
            f"reward {_number(metrics.get('reward/mean'))} (avg {_number(self._average('reward/mean'))})",
            *(f"{name.removeprefix('reward/')} {_number(metrics.get(name))}" for name in self._task_names()),
            f"tokens {_number(metrics.get('response/tokens_mean'), 1)}",
            f"{_number(metrics.get('time/total'), 1)} s",
            " ".join(f"{name} {share:.0%}" for name, share in self._shares().items() if share >= 0.005),
            f"left {_clock(self._left())}",
        ]
        return Text("  ".join(part for part in parts if part))

    def _panel(self) -> RenderableType:
        try:
            return Panel(Group(*self._panel_rows()), title=f"{self._run.stage}", title_align="left")
        except Exception as problem:  # rich calls this method in its own thread and would hide the error
            return Text(f"(the progress display cannot draw: {problem!r})")

    def _panel_rows(self) -> list[RenderableType]:
        wide = self._console.width >= NARROW
        rows: list[RenderableType] = [self._progress()]
        rows.append(self._now())
        if self._metrics:  # the table is last: a terminal with few lines shows only the first rows
            rows += [Text(), *self._time_bar(wide), Text(), self._task_table(wide)]
        return rows

    def _progress(self) -> RenderableType:
        done, total = int(self._metrics.get("iteration", 0)), self._run.iterations
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, total), completed=done)
        row.add_row(f"iteration {done}/{total}", bar, f"{_clock(self._left())} left")
        return row

    def _task_table(self, wide: bool) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title in ["", "reward", f"avg {WINDOW}", "held-out", "tokens"][: 5 if wide else 3]:
            table.add_column(title, justify="right" if title else "left", no_wrap=True, overflow="ellipsis")
        if wide:
            table.add_column("trend", no_wrap=True, overflow="ellipsis")
        for name in ["reward/mean", *self._task_names()]:
            cells = self._task_cells(name)
            table.add_row(*(cells if wide else cells[:3]), style="bold" if name == "reward/mean" else "")
        return table

    def _task_cells(self, name: str) -> list[RenderableType]:
        task = name.removeprefix("reward/")
        everything = name == "reward/mean"
        length = "response/tokens_mean" if everything else f"response/tokens_mean/{task}"
        held_out = _with_average(self._held_out).get("average" if everything else task)
        return [
            Text("all" if everything else task),
            Text(_number(self._metrics.get(name))),
            Text(_number(self._average(name)), style="cyan"),
            Text(_number(held_out)),
            Text(_number(self._metrics.get(length), 1)),
            Text(_sparkline(self._recent(name), BARS if self._unicode() else ASCII_BARS), style="green"),
        ]

    def _time_bar(self, wide: bool) -> list[RenderableType]:
        """Returns a bar with each phase's share of the last iteration's time, and the legend of the bar."""
        shares = self._shares()
        width = max(10, self._console.width - 6)
        bar, legend = Text(no_wrap=True, overflow="crop"), Text()
        for name, share in shares.items():
            style = SHARES.get(name, "bright_black")
            mark = "█" if self._unicode() else name[0]
            bar.append(mark * round(share * width), style=style)
            if share >= 0.005:
                legend.append(f"{name} {share:.0%}  ", style=style)
        total = f"{_number(self._metrics.get('time/total'), 1)} s: "
        return [bar, Text(total if wide else "") + legend] if shares else []

    def _unicode(self) -> bool:
        return not self._console.options.ascii_only

    def _now(self) -> RenderableType:
        now = time.monotonic()
        running = f"{self._phase}, {_clock(now - self._phase_began)}; " if self._phase else ""
        return Text(f"{running}running for {_clock(now - self._began)}", style="dim")


def families(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns each task's held-out reward (`eval/<task>`), without other `eval/*` metrics such as eval/win_rate."""
    tasks = [name for name in metrics if name.startswith("eval/") and describe(name).name == "eval/<task>"]
    return {name.removeprefix("eval/"): metrics[name] for name in tasks}


def _with_average(families: Mapping[str, float]) -> dict[str, float]:
    return {**families, "average": sum(families.values()) / len(families)} if families else {}


def _held_out_table(families: Mapping[str, float]) -> Table:
    table = Table()
    table.add_column("family")
    table.add_column("reward", justify="right")
    for name, value in families.items():
        table.add_row(Text(name), _number(value))
    table.add_section()
    table.add_row("average", _number(_with_average(families).get("average")), style="bold")
    return table


def _before_after(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Returns a table with the rewards before and after training. It has all tasks that were evaluated both times, and
    the average over these tasks."""
    both = [name for name in before if name in after]
    first, last = (_with_average({name: one[name] for name in both}) for one in (before, after))
    table = Table()
    for title in ("family", "before", "after", "change"):
        table.add_column(title, justify="left" if title == "family" else "right")
    for name in first:
        if name == "average":
            table.add_section()
        change = last[name] - first[name]
        cells = (_number(first[name]), _number(last[name]), Text(f"{change:+.3f}", style=_good(change)))
        table.add_row(Text(name), *cells, style="bold" if name == "average" else "")
    return table


def _good(change: float) -> str:
    return "green" if change > 0 else "red" if change < 0 else ""


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _clock(seconds: float | None) -> str:
    """Returns a duration as `1:02:03` or `2:03`, and an unknown duration as `-:--`."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _sparkline(values: Collection[float], bars: str) -> str:
    """Draws one bar (a character) per value. The lowest value gets the lowest bar, and the highest value gets the
    highest bar."""
    low, high = min(values, default=0), max(values, default=0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0
    return "".join(bars[round((value - low) * scale)] for value in values)
