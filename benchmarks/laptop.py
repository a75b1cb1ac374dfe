"""Measures how much another busy process delays the iterations of a run on two cores.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered).
"""

import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Result, benchmark, busy_process

ITERATIONS, WARM_UP = 9, 1  # iterations of a run; number of first iterations that are not measured
ROUNDS = 3  # number of runs of each side
GOAL = 2.0
DEFAULTS = {"GOMP_SPINCOUNT": "300000", "RAY_worker_niceness": "15"}
"""The default settings of the OpenMP library and of Ray: threads spin for some milliseconds, and workers have a low
priority."""


@benchmark("laptop/busy")
def busy() -> Result:
    """Compares iterations on a machine with one busy process and on a quiet machine. The goal is a ratio of at most 2.

    Runs the shipped recipe rlvr with the CPU profile. ours_s is the time of an iteration on the quiet machine. other_s
    is the time while another process computes without pause. ratio is other_s / ours_s. If the run and the other
    process share the two cores fairly, the ratio is 1.3 to 2. default_quiet_s is the time on the quiet machine with the
    default settings of the OpenMP library and of Ray; ours_s should be at most 1.05 times this time.

    All runs have the same seed, so an iteration does the same work in each run. The time of an iteration is the
    shortest of three runs, because other programs of the machine only make it longer. The results are the medians over
    eight iterations.
    """
    sides = ("quiet", "busy", "default")
    runs: dict[str, list[list[float]]] = {side: [] for side in sides}
    for turn in range(ROUNDS):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            with busy_process() if side == "busy" else nullcontext():
                runs[side].append(_seconds(DEFAULTS if side == "default" else {}))
    quiet, beside, default = (statistics.median(map(min, zip(*runs[side], strict=True))) for side in sides)
    more = {"goal": f"ratio at most {GOAL:g}", "default_quiet_s": default, "quiet_growth": quiet / default - 1}
    return Result(quiet, beside, beside / quiet, GOAL, more=more)


def _seconds(environment: dict[str, str]) -> list[float]:
    """Makes a run and returns the times of its iterations, in seconds, without the first WARM_UP iterations."""
    from benchmarks.iteration import start

    with TemporaryDirectory() as name:
        run = Path(name, "run")
        start(
            "rl.run", "rlvr", "--profile", "cpu", "--output", str(run), f"iterations={ITERATIONS}", "data.eval=[]",
            "log.trackers=[]", "checkpoint.every=1000",
            **environment,
        )  # fmt: skip
        lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["time/total"] for line in lines[1 + WARM_UP :]]
