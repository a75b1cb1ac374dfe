"""Tests when a signal ends a run: at once while the run waits, otherwise at the next `check`."""

import asyncio
import os
import pty
import signal
import subprocess
import sys
import textwrap

import pytest

from rl import interrupt
from rl.actors import signals_as_raised
from rl.interrupt import Interrupted, Interrupts, also_stopped_by, run_async


@pytest.fixture(autouse=True)
def terminal_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGHUP, the output of this process stays visible."""
    monkeypatch.setattr(interrupt, "_leave_terminal", lambda: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


def test_two_signals_of_timeout_at_the_same_moment_count_as_one() -> None:
    with Interrupts().installed() as interrupts:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.stop_requested


def ended(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process. The code has an object `interrupts` whose handlers are installed."""
    begin = "import os, signal, time; from rl import interrupt; interrupt.REPEAT_S = 0.1\n"
    begin += "interrupts = interrupt.Interrupts(); interrupts.installed().__enter__()\n"
    code = begin + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_of_the_same_kind_ends_the_process(name: str) -> None:
    kill = f"os.kill(os.getpid(), signal.{name}); time.sleep(0.2)\n"
    assert ended(f"{kill * 2}print('survived')").returncode == -signal.Signals[name]


def test_a_signal_of_another_kind_does_not_end_the_process_that_saves() -> None:
    done = ended(
        """
        with interrupt.also_stopped_by("SIGUSR1"), interrupt.Interrupts().installed() as saving:
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
                time.sleep(0.2)
            print("saved", saving.stop_requested)
        """
    )
    assert (done.returncode, done.stdout) == (0, "saved True\n"), done.stderr


def test_a_command_that_nohup_started_ignores_sighup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().installed() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_sighup_output_to_the_closed_terminal_is_no_error() -> None:
    ours, theirs = pty.openpty()
    code = """
        import os, signal, sys
        from rl.interrupt import Interrupts
        with Interrupts().installed() as interrupts:
            print("ready", flush=True)
            while not interrupts.stop_requested:
                signal.pause()
            print("saved", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)  # the terminal is closed
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0


def test_a_signal_cancels_a_coroutine_which_can_clean_up() -> None:
    cleaned = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_async(work())
    assert cleaned == [True] and signal.getsignal(signal.SIGTERM) == before


def test_a_coroutine_without_a_signal_returns_its_result() -> None:
    async def work() -> int:
        return 3

    assert run_async(work()) == 3


def test_an_added_signal_ends_a_command_as_well() -> None:
    before = list(interrupt.SIGNALS)
    added = also_stopped_by("SIGUSR1")
    with added, Interrupts().installed() as interrupts, pytest.raises(Interrupted), interrupts.waiting():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert before == interrupt.SIGNALS
