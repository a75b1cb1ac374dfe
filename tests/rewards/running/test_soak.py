"""Tests both pools of reward processes with many jobs of every kind, while processes are killed. The short form is in
the default run; the slow form scores 100,000 samples."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from rewards.running.runner import RewardRunner
from rl.types import Prompt, Rollout
from tests.support.command import ROOT
from tests.support.patience import at_most, slowness
from tests.support.reward_plugins import spec

PLUGIN = """
import asyncio, time
from rewards import Score, reward

def common(text):
    kind, number = text.split()[:2]
    if kind == "raise":
        raise KeyError(number)
    return Score(int(number) % 5 / 4, {"long": "x" * 100_000} if kind == "huge" else {})

@reward("computes", timeout_s=2)
def computes(rollout):
    if rollout.text.startswith(("slow", "block")):
        time.sleep(0.05)
    return common(rollout.text)

@reward("waits", timeout_s=2)
async def waits(rollout):
    if rollout.text.startswith("slow"):
        await asyncio.sleep(0.2)
    if rollout.text.startswith("block"):
        time.sleep(0.05)
    return common(rollout.text)
"""
SCRIPT = """
import sys
from tests.rewards.running.test_soak import runner_of, samples
with runner_of(sys.argv[1]) as runner:
    print("begins", flush=True)
    runner.score(samples(100_000))
"""
RARE = {0: "slow", 1: "raise", 2: "huge", 3: "block"}


def runner_of(folder: str | Path) -> RewardRunner:
    tasks = {name: [spec(f"plugin.py:{name}")] for name in ("computes", "waits")}
    return RewardRunner(tasks, folder)


def samples(count: int) -> list[Rollout]:
    """Returns samples for both pools in turn. Of a thousand samples, four are slow, four raise an error, four are
    large and four block their process."""
    made = []
    for i in range(count):
        kind = RARE.get(i // 2 % 250, "instant")
        filler = " y" * 100_000 if kind == "huge" else ""
        made.append(Rollout(Prompt(str(i), ("computes", "waits")[i % 2], ()), f"{kind} {i}{filler}"))
    return made


@contextmanager
def killing(every_s: float) -> Iterator[list[int]]:
    """Kills a random reward process soon, and then one every few seconds. Yields the ids of the killed processes."""
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        choose = random.Random(0)
        pause = 0.1
        while not ended.wait(pause):
            pause = every_s * slowness()  # a process needs longer to start if the machine is slow
            children = psutil.Process().children(recursive=True)
            with suppress(psutil.Error, IndexError):
                victim = choose.choice([c for c in children if "rewards.running" in str(c.cmdline())])
                victim.kill()
                killed.append(victim.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("count", "every_s", "limit_s"), [(4000, 1.0, 60), pytest.param(100_000, 2.0, 600, marks=pytest.mark.slow)]
)
def test_every_job_gets_its_answer_in_time_although_processes_are_killed(
    tmp_path: Path, count: int, every_s: float, limit_s: float
) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    rollouts = samples(count)
    with runner_of(tmp_path) as runner:
        runner.start().result()
        with killing(every_s) as killed, at_most(limit_s):
            scored = runner.score(rollouts)
    assert killed
    problems = Counter[str]()
    for number, (rollout, one) in enumerate(zip(rollouts, scored, strict=True)):
        if rollout.text.startswith("raise"):
            assert one.invalid and "KeyError" in one.invalid
        elif one.invalid is not None:
            problems[one.invalid] += 1
        else:
            assert one.reward == number % 5 / 4
    # A sample is lost only if two of its processes were killed.
    assert problems.total() <= 2, problems


@pytest.mark.parametrize("after_s", [0.0, 0.4, pytest.param(4.0, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_scoring_in_seconds_at_any_moment(tmp_path: Path, after_s: float) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"begins\n"
    time.sleep(after_s)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15 * slowness())
    assert process.returncode != 0 and b"KeyboardInterrupt" in err
    assert psutil.wait_procs(children, timeout=15 * slowness())[1] == []
