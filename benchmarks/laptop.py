"""Measures how much another busy process delays the iterations of a run on two cores.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered).
"""

import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Result, benchmark, busy_process

ITERATIONS, WARM_UP = 7, 1  # iterations of a run; number of first iterations that are not measured
GOAL = 2.0
DEFAULTS = {"GOMP_SPINCOUNT": "300000", "RAY_worker_niceness": "15"}
"""The default settings of the OpenMP library and of Ray: threads spin for some milliseconds, and workers have a low
priority."""


@benchmark("laptop/busy")
def busy() -> Result:
    """Compares iterations on a machine with one busy process and on a quiet machine. The goal is a ratio of at most 2.

    Runs the shipped recipe rlvr with the CPU profile. ours_s is the median time of an iteration on the quiet machine.
    other_s is the median time while another process computes without pause. ratio is other_s / ours_s. If the run and
    the other process share the two cores fairly, the ratio is 1.3 to 2. default_quiet_s is the time on the quiet
    machine with the default settings of the OpenMP library and of Ray; ours_s should be at most 1.05 times this time.
    """
    sides = ("quiet", "busy", "default")
    times: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides + sides[::-1]:
        with busy_process() if side == "busy" else nullcontext():
            times[side].append(_seconds(DEFAULTS if side == "default" else {}))
    quiet, beside, default = (statistics.median(times[side]) for side in sides)
    more = {"goal": f"ratio at most {GOAL:g}", "default_quiet_s": default, "quiet_growth": quiet / default - 1}
    return Result(quiet, beside, beside / quiet, GOAL, more=more)


def _seconds(environment: dict[str, str]) -> float:
    """Makes a run and returns the median of its iterations' times, in seconds."""
    from benchmarks.iteration import start

    with TemporaryDirectory() as name:
        run = Path(name, "run")
        start(
            "rl.run", "rlvr", "--profile", "cpu", "--output", str(run), f"iterations={ITERATIONS}", "data.eval=[]",
            "log.trackers=[]", "checkpoint.every=1000",
            **environment,
        )  # fmt: skip
        lines = (run / "metrics.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["time/total"] for line in lines[1 + WARM_UP :]])
