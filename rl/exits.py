"""Defines the exit codes of all commands, and prints a message if a command fails or is interrupted.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 interrupted after saving.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rl.interrupt import Interrupts, also_stopped_by
from rl.stop import Stop, WorkerDied

if TYPE_CHECKING:
    from rl.config import Config

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
NO_GPU = (
    "{recipe} is the full-size run: it needs a GPU for each vLLM engine, for the policy and for the critic, and this "
    "machine has none.\nTo run it here with the shipped small model: add --profile cpu. To use your own small model "
    "on the CPU: add learner.device=cpu."
)


class InputError(ValueError):
    """The user's input is wrong. The command prints only the message, without a traceback."""


@contextmanager
def as_input_error() -> Iterator[None]:
    """Converts a ValueError or an OSError in the `with` block to an InputError. For example, reading a missing file
    raises an OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def add_stop_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option --stop-signal to the parser of a command. `run_command` gets the option's value."""
    parser.add_argument(
        "--stop-signal",
        choices=("SIGUSR1", "SIGUSR2"),
        help="one more signal that ends the command as Ctrl-C does, for batch systems that send it before their limit",
    )


def run_command(
    work: Callable[[], int],
    *,
    input_errors: tuple[type[Exception], ...] = (InputError,),
    failures: tuple[type[Exception], ...] = (Stop, WorkerDied),
    resume: str = "",
    interrupted: str = "interrupted",
    stop_signal: str | None = None,
) -> int:
    """Runs a command and returns its exit code. Catches `input_errors` and `failures` and prints the message to
    standard error. Other exceptions are not caught.

    Args:
        work: a function that runs the command and returns the exit code.
        input_errors: exceptions after which the exit code is 2.
        failures: exceptions after which the exit code is 1. If an exception is in `input_errors` and in `failures`, the
            exit code is 2.
        resume: advice on how to continue, printed after a failure and after an interruption.
        interrupted: message after Ctrl-C, SIGTERM, SIGHUP or `stop_signal`.
        stop_signal: one more signal that ends the command.
    """
    interrupts = Interrupts()
    try:
        with also_stopped_by(stop_signal), interrupts.installed(), interrupts.waiting():
            return work()
    except input_errors as error:
        code, message = WRONG_INPUT, f"error: {error}"
    except failures as error:
        code, message = FAILED, "\n".join(filter(None, [f"error: {error}", resume]))
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "\n".join(filter(None, [interrupted, resume]))
    print(message, file=sys.stderr)
    return code


def has_gpus() -> bool:
    """True if this machine has GPUs, or if RAY_ADDRESS names a cluster, because the cluster may have GPUs."""
    import torch

    return torch.cuda.is_available() or "RAY_ADDRESS" in os.environ


def check_hardware(config: "Config", *, dry_run: bool) -> None:
    """Raises InputError if the recipe needs GPUs and no GPU is found. A dry run does not need GPUs."""
    if config.learner.device != "cpu" and not dry_run and not has_gpus():
        raise InputError(NO_GPU.format(recipe="This recipe"))
