"""Tests how processes are started and named, that a hanging process is noticed after `patience` seconds, and that a
hanging team of processes is killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rl.actors import cluster, place, place_team
from rl.interrupt import SIGNALS
from rl.stop import WorkerDied
from tests.support.command import wait_until


class Sleeper:
    """Writes its process id to a file, then sleeps."""

    def __init__(self, folder: str, seconds: float = 0, rank: int = 0, count: int = 1, address: str = "") -> None:
        Path(folder, str(rank)).write_text(str(os.getpid()))
        time.sleep(seconds)

    @classmethod
    def of_rank(cls, folder: str, rank: int, count: int, address: str) -> "Sleeper":
        return cls(folder, 0, rank, count, address)

    def nap(self) -> str:
        return "slept"

    def priority(self) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    def sleep(self) -> None:
        signal.pause()


BEFORE_RAY = {number: signal.getsignal(number) for number in SIGNALS}


@pytest.fixture(scope="module")
def joined() -> Iterator[None]:
    with cluster():
        yield


def ended(process: Path) -> Callable[[], bool]:
    return lambda: not Path("/proc", process.read_text()).exists()


def test_a_process_that_hangs_while_it_starts_is_noticed(joined: None, tmp_path: Path) -> None:
    worker = place(Sleeper, str(tmp_path), 1000)
    with pytest.raises(WorkerDied, match=r"no sign of life for 1 s"):
        worker.ready(1)
    worker.end()


def test_a_process_has_the_priority_of_the_command(joined: None, tmp_path: Path) -> None:
    worker = place(Sleeper, str(tmp_path), 0)
    assert worker.start(Sleeper.priority).result(60) == os.getpriority(os.PRIO_PROCESS, 0)
    worker.end()


def test_ps_shows_the_method_that_a_process_runs(joined: None, tmp_path: Path) -> None:
    worker = place(Sleeper, str(tmp_path), 0)
    worker.ready(60)
    worker.start(Sleeper.sleep)
    command_line = Path("/proc", (tmp_path / "0").read_text(), "cmdline")
    wait_until(lambda: command_line.read_bytes().startswith(b"ray::Sleeper.sleep\0"))
    worker.end()


def test_ray_keeps_the_commands_signal_handlers_and_gets_no_signals_of_its_group(joined: None) -> None:
    assert {number: signal.getsignal(number) for number in SIGNALS} == BEFORE_RAY
    servers = [entry for entry in Path("/proc").glob("[0-9]*") if _is_raylet_of_ours(entry)]
    assert servers and all(os.getpgid(int(entry.name)) != os.getpgrp() for entry in servers)


def _is_raylet_of_ours(process: Path) -> bool:
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"/raylet\0" in (process / "cmdline").read_bytes()
    except OSError:  # the process has ended
        return False


def test_a_team_that_hangs_is_killed(joined: None, tmp_path: Path) -> None:
    team = place_team(Sleeper.of_rank, str(tmp_path), count=2, patience=5)
    team.ready(60)
    assert team.start(Sleeper.nap).result() == "slept"
    with pytest.raises(WorkerDied, match=r"no sign of life for 5 s"):
        team.start(Sleeper.sleep).result()
    for rank in "01":
        wait_until(ended(tmp_path / rank))
