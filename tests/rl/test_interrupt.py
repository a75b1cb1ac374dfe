"""Tests when a signal ends a run: at once while the run waits, otherwise at the next `check`."""

import os
import signal

import pytest

from rl.actors import signals_as_raised
from rl.interrupt import Interrupted, Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_is_raised_at_once(number: int) -> None:
    with Interrupts().installed() as interrupts, pytest.raises(Interrupted), interrupts.waiting():
        os.kill(os.getpid(), number)
        raise AssertionError("went on")


def test_a_signal_during_an_update_takes_effect_at_its_end() -> None:
    done = []
    with Interrupts().installed() as interrupts, pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("update")  # this line is not reached if the signal raises an exception at once
        interrupts.check()
        done.append("next update")
    assert done == ["update"]


def test_a_run_that_was_asked_to_stop_does_not_start_waiting_again() -> None:
    with Interrupts().installed() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted), interrupts.waiting():
            raise AssertionError("went on")


def test_the_former_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_is_raised_in_place_of_the_system_error_of_ray() -> None:
    with pytest.raises(Interrupted), signals_as_raised():
        raise SystemError("wait returned a result with an exception set") from Interrupted()
    with pytest.raises(SystemError, match="bad call"), signals_as_raised():
        raise SystemError("bad call")
