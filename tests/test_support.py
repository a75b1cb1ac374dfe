"""Checks that the helpers of tests/support leave no process behind, whether a test passes or fails, and that time
limits follow the speed of the machine."""

import os
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from benchmarks.harness import busy_process
from tests.support import engine_process, patience
from tests.support.command import MARK, ROOT, Command, end_all
from tests.support.engine_process import VllmProcess
from tests.support.patience import CORES, Deadline, at_most, slowness

FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> Command:
    """A command that has started a second process in another session. Both processes run for ten minutes if nothing
    ends them."""
    (tmp_path / "family.py").write_text(FAMILY)
    command = Command("family", folder=tmp_path)
    deadline = Deadline(30)
    while len(command.marked()) < 2:
        assert not deadline.passed()
        time.sleep(0.05)
    return command


def test_a_command_that_does_not_finish_in_time_is_ended_with_all_it_started(family: Command) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        family.finish(timeout=0.1)
    assert family.left_behind(patience=0) == []


def test_what_a_command_leaves_behind_after_a_crash_is_ended_too(family: Command) -> None:
    family.process.kill()
    family.process.wait()
    assert len(family.left_behind(patience=0)) == 1
    end_all()
    assert family.left_behind(patience=0) == []


def test_a_test_that_fails_leaves_no_command_behind(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text(
        textwrap.dedent("""
            import pytest
            from tests.support.command import Command

            @pytest.fixture(scope="module")
            def broken():
                print("mark", Command("http.server", "0").mark)
                raise ValueError

            def test_with_a_broken_fixture(broken): ...

            def test_that_fails():
                print("mark", Command("http.server", "0").mark)
                assert False
        """)
    )
    options = ("-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "--rootdir", tmp_path, "-c", os.devnull)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, options), str(failing)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    marks = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("mark ")]
    assert "1 failed, 1 error" in done.stdout and len(marks) == 2, done.stdout
    assert [mark for mark in marks if _runs_with(mark)] == []


def _runs_with(mark: str) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                return True
        except OSError:  # the process has ended
            continue
    return False


def test_an_engine_process_whose_call_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "PATIENCE_S", 0.5)
    process = VllmProcess()
    with pytest.raises(TimeoutError):
        process.run(time.sleep, 600)
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process._pid, 0)


def test_a_machine_with_other_work_is_slow() -> None:
    with ExitStack() as others:
        for _ in range(4 * CORES):
            others.enter_context(busy_process())
        assert slowness() > 1.2


@pytest.mark.parametrize(("slow", "fails"), [(1.0, True), (10.0, False)])
def test_a_block_may_take_longer_only_if_the_machine_is_slow(
    monkeypatch: pytest.MonkeyPatch, slow: float, fails: bool
) -> None:
    monkeypatch.setattr(patience, "slowness", lambda: slow)
    with pytest.raises(AssertionError, match="the limit is") if fails else nullcontext(), at_most(0.1):
        time.sleep(0.2)


@pytest.mark.parametrize(("slow", "passed"), [(1.0, True), (10.0, False)])
def test_the_clock_of_a_deadline_runs_more_slowly_if_the_machine_is_slow(
    monkeypatch: pytest.MonkeyPatch, slow: float, passed: bool
) -> None:
    monkeypatch.setattr(patience, "slowness", lambda: slow)
    deadline = Deadline(0.1)
    assert not deadline.passed()
    time.sleep(0.2)
    assert deadline.passed() is passed
