"""Tests that commands end with the right exit code and print one message instead of a traceback."""

import os
import signal
from collections.abc import Callable

import pytest

from rl.exits import DONE, FAILED, INTERRUPTED, WRONG_INPUT, InputError, check_hardware, run_command
from rl.interrupt import Interrupted
from rl.recipe.errors import RecipeError
from rl.stop import Stop, WorkerDied
from tests.support.configs import config


def raises(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no file x"), WRONG_INPUT, "error: no file x\n"),
        (RecipeError("mine.yaml: gama is no option"), WRONG_INPUT, "error: mine.yaml: gama is no option\n"),
        (Stop("the disk is full", saves=False), FAILED, "error: the disk is full\nThe same command continues\n"),
        (WorkerDied("an engine died"), FAILED, "error: an engine died\nThe same command continues\n"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\nThe same command continues\n"),
        (Interrupted(), INTERRUPTED, "interrupted\nThe same command continues\n"),
    ],
)
def test_an_expected_error_is_one_message_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raises(error), resume="The same command continues") == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_message(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.interrupt._leave_terminal", lambda: None)  # the output of this process stays visible

    def work() -> int:
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    before = signal.getsignal(number)
    assert run_command(work, resume="The same command continues") == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\nThe same command continues\n"
    assert signal.getsignal(number) == before


def test_a_command_without_errors_prints_nothing_and_keeps_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert (run_command(lambda: DONE), run_command(lambda: FAILED)) == (DONE, FAILED)
    assert capsys.readouterr().err == ""


def test_an_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raises(ZeroDivisionError()))


def test_a_command_can_add_expected_errors_and_wrong_input_has_precedence() -> None:
    named = {"input_errors": (FileNotFoundError,), "failures": (OSError,)}
    assert run_command(raises(FileNotFoundError("x")), **named) == WRONG_INPUT
    assert run_command(raises(PermissionError("x")), **named) == FAILED


def test_a_recipe_for_gpus_is_refused_without_gpus_but_a_dry_run_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = config()
    with pytest.raises(InputError, match="add --profile cpu"):
        check_hardware(made, dry_run=False)
    check_hardware(made, dry_run=True)
    check_hardware(config(learner__device="cpu"), dry_run=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # the Ray cluster at this address may have GPUs
    check_hardware(made, dry_run=False)
