"""Measures the reward runner: its throughput with a hung sample, and its CPU time compared with Math-Verify alone.

Tested in tests/benchmarks/test_harness.py.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from typing import Any

from benchmarks.harness import CORES, Result, benchmark, interleaved, max_abs_diff
from rewards.running.runner import RewardRunner
from rl.config import RewardSpec
from rl.types import Prompt, Rollout, Scored

SAMPLES, ANSWERS = 64, 2000
TIMEOUT_S = 6.0

PLUGIN = '''
import time

from rewards import Rollout, reward


def work(rounds: int) -> int:
    total = 1
    for i in range(rounds):
        total = (total * 31 + i) % 1_000_003
    return total


@reward("half_and_half")
def half_and_half(rollout: Rollout, rounds: int, rest_s: float) -> float:
    """Computes for a while, then sleeps like a reward that waits for a file. Never returns for the answer `hang`."""
    while rollout.answer == "hang":
        pass
    total = work(rounds + len(rollout.answer))
    time.sleep(rest_s)
    return total / 1_000_003
'''


def rollout(text: str, truth: str | None = None, row: str = "row") -> Rollout:
    return Rollout(Prompt(row, "task", (), ground_truth=truth), text)


@benchmark("rewards/hung")
def hung() -> Result:
    """Compares the throughput of scoring 64 samples with and without a hung sample; goal: ratio at least 0.9.

    There is one worker per core. For each sample, the reward computes for about 50 ms and then sleeps for 50 ms. The
    amount of computation is fixed, so scoring is slower if another process uses the cores. The hung sample is in the
    middle of the batch. For this sample, the reward computes until the time limit of 6 s.

    ours_s is the time until the other 63 samples are scored. other_s is the time of 64 samples without a hung sample.
    ratio is (63 / ours_s) / (64 / other_s). `all_s` is the time until all samples are done, including the hung sample,
    which ends at its time limit.
    """
    with half_and_half() as runner:
        fine = [rollout("." * (1 + place)) for place in range(SAMPLES)]
        stuck = [*fine[: SAMPLES // 2], rollout("hang"), *fine[SAMPLES // 2 + 1 :]]
        values: dict[str, list[float]] = {}
        ends: list[float] = []

        def none() -> float:
            times, scored = timed(runner, fine)
            values["other"] = [one.reward for place, one in enumerate(scored) if place != SAMPLES // 2]
            return max(times)

        def one() -> float:
            times, scored = timed(runner, stuck)
            ends.append(times.pop(SAMPLES // 2))
            assert scored.pop(SAMPLES // 2).invalid == f"reward half_and_half: took longer than {TIMEOUT_S:g} s"
            values["ours"] = [one.reward for one in scored]
            time.sleep(2.0)  # wait until a new process has replaced the killed process
            return max(times)

        none()  # warm up: the runner learns the usual time of a sample
        ours_s, other_s = interleaved(one, none, repeats=5)
    ratio = (SAMPLES - 1) / ours_s / (SAMPLES / other_s)
    more = {"goal": "at least 0.9", "all_s": sorted(ends)[len(ends) // 2], "cores": CORES}
    return Result(ours_s, other_s, ratio, 0.9, max_abs_diff(values["ours"], values["other"]), more)


@contextmanager
def half_and_half() -> Iterator[RewardRunner]:
    """Yields a runner that is warmed up. Its reward computes for 50 ms on an idle core and sleeps for 50 ms."""
    scope: dict[str, Any] = {}
    exec(PLUGIN, scope)
    rounds = 100_000
    took = []
    for _ in range(5):
        start = time.process_time()
        scope["work"](rounds)
        took.append(time.process_time() - start)
    params = {"rounds": int(rounds * 0.05 / min(took)), "rest_s": 0.05}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plugin.py").write_text(PLUGIN)
        spec = RewardSpec(use="plugin.py:half_and_half", params=params, timeout_s=TIMEOUT_S)
        with RewardRunner({"task": [spec]}, folder, workers=CORES) as runner:
            runner.start().result()
            time.sleep(2.0)  # wait until the runner's reserve process is ready
            yield runner


def timed(runner: RewardRunner, rollouts: Sequence[Rollout]) -> tuple[list[float], list[Scored]]:
    """Scores the rollouts. Returns the seconds until each score arrived, and the scores."""
    ends = [0.0] * len(rollouts)
    start = time.monotonic()

    def note(place: int, future: Future[Scored]) -> None:
        ends[place] = time.monotonic() - start

    futures = [runner.submit(rollout) for rollout in rollouts]
    for place, future in enumerate(futures):
        future.add_done_callback(lambda future, place=place: note(place, future))
    return ends, runner.results(futures)


@benchmark("rewards/math")
def mathematics() -> Result:
    """Compares the CPU time of scoring 2,000 answers in the runner and with Math-Verify alone; goal: ratio at most 1.3.

    Our side is a runner, which scores the answers with the reward `math_verify`. The other side is one process. It
    parses each ground truth and answer and verifies the answer, without time limits. ours_s and other_s are CPU seconds
    (user and system) of a new process from start to end, child processes included. The time of imports counts on both
    sides. On our side, each worker, the reserve process and the parent process import the packages. ratio is ours_s /
    other_s. `wall_speed_up` is the wall-clock time of the other side divided by that of our side.
    """
    walls: dict[str, list[float]] = {"ours": [], "other": []}
    scores: dict[str, list[float]] = {}

    def side(name: str) -> float:
        cpu_s, wall_s, scores[name] = fresh(name)
        walls[name].append(wall_s)
        return cpu_s

    ours_s, other_s = interleaved(lambda: side("ours"), lambda: side("other"), repeats=3)
    wall = {name: sorted(one)[len(one) // 2] for name, one in walls.items()}
    more = {
        "goal": "at most 1.3",
        "unit": "CPU s",
        "ours_wall_s": wall["ours"],
        "other_wall_s": wall["other"],
        "wall_speed_up": wall["other"] / wall["ours"],
        "right": sum(scores["ours"]) / ANSWERS,
        "cores": CORES,
    }
    return Result(ours_s, other_s, ours_s / other_s, 1.3, max_abs_diff(scores["ours"], scores["other"]), more)


def fresh(side: str) -> tuple[float, float, list[float]]:
    """Runs one side in a new process. Returns CPU seconds, wall-clock seconds and scores."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # workers use this seed too, so sympy orders sets alike
    command = [sys.executable, "-m", "benchmarks.rewards", side]
    root = Path(__file__).parent.parent
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True)
    wall_s, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, wall_s, json.loads(done.stdout)


def ours(pairs: Sequence[tuple[str, str]]) -> list[float]:
    rollouts = [rollout(answer, truth, f"row-{place}") for place, (truth, answer) in enumerate(pairs)]
    with RewardRunner({"task": [RewardSpec(use="math_verify")]}, workers=CORES) as runner:
        scored = runner.score(rollouts)
    assert not any(one.invalid for one in scored), next(one.invalid for one in scored if one.invalid)
    return [one.reward for one in scored]


def other(pairs: Sequence[tuple[str, str]]) -> list[float]:
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return [
        float(
            verify(parse(f"\\boxed{{{truth}}}", parsing_timeout=0), parse(answer, parsing_timeout=0), timeout_seconds=0)
        )
        for truth, answer in pairs
    ]


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Returns (ground truth, response) pairs. About half of the responses are right. Many of the right responses have
    another form than the ground truth."""
    draw = random.Random(seed)
    kinds = [integers, fractions, radicals, intervals, polynomials]
    made = []
    for place in range(count):
        truth, same, wrong = kinds[place % len(kinds)](draw)
        result = draw.choice([truth, same]) if draw.random() < 0.5 else wrong
        made.append((truth, draw.choice(PROSE).format(a=draw.randint(2, 99), b=draw.randint(2, 99), result=result)))
    return made


PROSE = [
    "First I name the unknown and write down what is given. Putting in {a} for it leaves {b} on the other side, which "
    "is possible in one way only. Therefore the result is \\boxed{{{result}}}.",
    "There are {a} cases to look at, and {b} of them lead nowhere. What is left can be added up directly.\n\n"
    "So we have $\\boxed{{{result}}}$.",
    "Let $n = {a}$ and $m = {b}$. Then $n + m$ is known, and the rest follows by comparing both sides of the "
    "equation.\n\n\\[\\boxed{{{result}}}\\]",
]


def integers(draw: random.Random) -> tuple[str, str, str]:
    """Returns a ground truth, the same value in another form, and a wrong value. The four functions below also return
    three such values."""
    n = draw.randint(-500, 5000)
    return str(n), f"x = {n}", str(n + draw.choice([-10, -1, 1, 10]))


def fractions(draw: random.Random) -> tuple[str, str, str]:
    p, q = draw.randint(1, 60), draw.randint(2, 60)
    p, q = (p // gcd(p, q), q // gcd(p, q)) if p % q else (p * q + 1, q)
    k = draw.randint(2, 5)
    return f"\\frac{{{p}}}{{{q}}}", f"\\frac{{{p * k}}}{{{q * k}}}", f"\\frac{{{p + q + 1}}}{{{q}}}"


def radicals(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(2, 12), draw.choice([2, 3, 5, 6, 7, 10, 11, 13])
    return f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a + 1}\\sqrt{{{b}}}"


def intervals(draw: random.Random) -> tuple[str, str, str]:
    low, width = draw.randint(-20, 20), draw.randint(1, 30)
    high = low + width
    return f"[{low}, {high})", f"\\left[{low},{high}\\right)", f"[{low}, {high}]"


def polynomials(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(1, 9), draw.randint(10, 19)
    return f"x^2 + {a + b}x + {a * b}", f"(x+{a})(x+{b})", f"x^2 + {a + b}x + {a * b + 1}"


if __name__ == "__main__":
    print(json.dumps({"ours": ours, "other": other}[sys.argv[1]](pairs(ANSWERS))))
