"""The exit code and the message of a command that succeeds, fails, or is interrupted."""

import pytest

from rl import exits
from rl.exits import DONE, FAILED, INTERRUPTED, WRONG_INPUT, InputError, check_hardware, run_command
from rl.interrupt import Interrupted
from rl.stop import Stop, WorkerDied
from tests.support.configs import config


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


def test_a_command_that_ends_by_itself_has_its_own_code_and_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: DONE) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such file"), WRONG_INPUT, "error: no such file\n"),
        (Stop("the disk is full", saves=False), FAILED, "error: the disk is full\ngo on with X\n"),
        (WorkerDied("the policy died"), FAILED, "error: the policy died\ngo on with X\n"),
        (Interrupted(), INTERRUPTED, "interrupted\ngo on with X\n"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\ngo on with X\n"),
    ],
)
def test_an_error_becomes_its_exit_code_and_a_message_on_standard_error(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error), resume="go on with X") == code
    assert capsys.readouterr() == ("", message)


def test_an_unexpected_error_is_raised_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_input_errors_come_before_failures_of_the_same_type() -> None:
    both = {"input_errors": (ValueError,), "failures": (Exception,)}
    assert run_command(raising(ValueError()), **both) == WRONG_INPUT
    assert run_command(raising(OSError()), **both) == FAILED


def test_a_recipe_for_gpus_is_refused_on_a_machine_without_any_unless_it_only_runs_dry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exits, "has_gpus", lambda: False)
    check_hardware(config(learner__device="cpu"), dry_run=False)
    check_hardware(config(), dry_run=True)
    with pytest.raises(InputError, match="add --profile cpu"):
        check_hardware(config(), dry_run=False)
    monkeypatch.setattr(exits, "has_gpus", lambda: True)
    check_hardware(config(), dry_run=False)


def test_a_named_ray_cluster_may_have_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not exits.has_gpus()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert exits.has_gpus()
