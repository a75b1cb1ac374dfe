"""Tests the progress display in a terminal and in a log file. Errors of the display must not end the run."""

import io
import logging
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from rl.record.display import Display


@dataclass
class ShownRun:
    stage: str = "rlvr"
    iterations: int = 20


def line(iteration: int, counting: float = 0.5, pointing: float = 0.25) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "stage": "rlvr",
        "reward/mean": (counting + pointing) / 2,
        "reward/std": 0.1,
        "reward/counting": counting,
        "reward/counting/exact": counting,
        "reward/pointing": pointing,
        "reward/invalid_fraction": 0.0,
        "response/tokens_mean": 20.0,
        "response/tokens_mean/counting": 30.0,
        "response/tokens_mean/pointing": 10.0,
        "time/rollout": 5.0,
        "time/policy": 3.0,
        "time/total": 10.0,
    }


def console(terminal: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=30, _environ={"TERM": "xterm"})


def shown(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_without_a_terminal_each_iteration_is_one_plain_line() -> None:
    screen = console(width=40)
    with Display(ShownRun(), screen) as display:
        display.phase("rollout")
        display.iteration(line(1, counting=0.5))
        display.iteration(line(2, counting=1.0))
    first, second = shown(screen).splitlines()
    assert first.startswith("rlvr 1/20  reward 0.375 (avg 0.375)  counting 0.500  pointing 0.250  tokens 20.0")
    assert "rollout 50% policy 30% other 20%" in first
    assert first.endswith("left 3:10")  # 19 more iterations of 10 s each: 190 s
    assert "reward 0.625 (avg 0.500)" in second and second.endswith("left 3:00")


def test_a_terminal_gets_a_panel_with_tasks_trend_and_time() -> None:
    screen = console(terminal=True)
    with Display(ShownRun(), screen) as display:
        display.evaluation({"iteration": 0, "eval/counting": 0.125, "eval/pointing": 0.375})
        display.iteration(line(1))
        display.evaluation(line(1))  # line(1) has no eval/*, so the last evaluation stays on the screen
        display.phase("critic")
        display.iteration(line(2))
    text = shown(screen)
    for words in (
        "iteration 2/20",
        "avg 10",
        "counting",
        "0.125",
        "critic, 0:00",
        "rollout 50%",
        "3:00 left",
    ):
        assert words in text
    assert "0.125" in text.rpartition("iteration 2/20")[2]
    assert "exact" not in text  # components of a reward are not shown


@pytest.mark.parametrize("width", [1, 5, 20, 60, 300])
def test_the_panel_can_be_drawn_at_any_width(width: int, caplog: pytest.LogCaptureFixture) -> None:
    screen = console(terminal=True, width=width)
    with Display(ShownRun(), screen) as display:
        display.iteration(line(1))
        display.evaluation({"eval/counting": 0.5})
        display.summary({"eval/counting": 0.5}, {"eval/counting": 0.75})
    assert not caplog.records and "cannot draw" not in shown(screen)


def test_other_eval_metrics_are_not_shown_as_tasks_or_averaged() -> None:
    screen = console()
    display = Display(ShownRun(), screen)
    before = {"eval/chat": 0.25, "eval/win_rate": 0.9, "eval/order_agreement": 1.0}
    display.summary(before, {**before, "eval/chat": 0.5})
    assert "win_rate" not in shown(screen) and "0.250" in shown(screen)


def test_the_first_evaluation_is_a_table_and_later_ones_are_a_line_with_the_change() -> None:
    screen = console()
    display = Display(ShownRun(), screen)
    display.evaluation({"iteration": 0, "eval/counting": 0.25, "eval/pointing": 0.75})
    assert "│ average  │  0.500 │" in shown(screen)
    display.evaluation({"iteration": 10, "eval/counting": 0.5, "eval/pointing": 1.0})
    expected = "held-out at iteration 10:  counting 0.500 (+0.250)  pointing 1.000 (+0.250)  average 0.750 (+0.250)"
    assert shown(screen).splitlines()[-1] == expected


def test_the_summary_shows_each_family_before_and_after_and_the_average() -> None:
    screen = console()
    Display(ShownRun(), screen).summary(
        {"eval/counting": 0.25, "eval/pointing": 0.75, "iteration": 0},
        {"eval/counting": 0.75, "eval/pointing": 0.5},
    )
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in shown(screen).splitlines() if "│" in row]
    assert rows == [
        ["counting", "0.250", "0.750", "+0.500"],
        ["pointing", "0.750", "0.500", "-0.250"],
        ["average", "0.500", "0.625", "+0.125"],
    ]


def test_task_names_are_shown_as_they_are_and_never_read_as_markup() -> None:
    screen = console()
    display = Display(ShownRun(), screen)
    display.message("saved [bold]x[/bold]")
    display.summary({"eval/[red]": 0.0}, {"eval/[red]": 1.0})
    assert "saved [bold]x[/bold]" in shown(screen) and "[red]" in shown(screen)


@pytest.mark.parametrize("terminal", [False, True])
def test_values_that_are_not_numbers_cause_a_warning_and_do_not_end_the_run(
    terminal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    screen = console(terminal)
    with caplog.at_level(logging.WARNING), Display(ShownRun(), screen) as display:
        display.iteration({"iteration": "one", "reward/mean": "high", "time/total": "long"})
    assert ("cannot draw" in shown(screen)) if terminal else ("the run continues" in caplog.text)


class Closed(io.StringIO):
    """An output that its reader has closed, so that every write fails."""

    def write(self, text: str) -> int:
        raise OSError("broken")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_output_causes_a_warning_but_not_the_end_of_the_run(
    terminal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    screen = Console(file=Closed(), force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
    with caplog.at_level(logging.WARNING), Display(ShownRun(), screen) as display:
        display.iteration(line(1))
        display.summary({"eval/a": 0.0}, {"eval/a": 1.0})
    assert "the run continues" in caplog.text


def test_an_error_in_the_run_is_raised_and_the_panel_is_removed() -> None:
    screen = console(terminal=True)
    with pytest.raises(KeyboardInterrupt), Display(ShownRun(), screen) as display:
        display.phase("rollout")
        raise KeyboardInterrupt
    assert shown(screen).endswith("\x1b[?25h")  # this code shows the cursor again
