"""Kills processes of a real run at random moments, and checks that the results are the same as without kills.

    python -m tests.chaos [--faults 10] [--seed 0] [--kinds driver group Policy Critic Engine hang]

The command makes the same small run of the CPU profile twice: once undisturbed, and once with faults. Most faults are a
SIGKILL to the driver alone (driver), to the whole process group of the driver (group), or to a worker process of the
class Policy, Critic or Engine. The fault `hang` is a SIGSTOP to an engine that samples. If a fault ends the run, the
run is resumed.

Both runs must have every iteration exactly once, with all samples. If no fault was of the kind Engine or hang, metrics,
samples and weights must also be equal bit for bit. After such a fault, a new engine answers the open requests in other
batches, so the last digits of its logprobs differ.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from tests.support.command import ROOT, Command, metrics, named, run, samples, without_times
from tests.support.patience import Deadline

ITERATIONS, PROMPTS, ROLLOUTS = 12, 8, 4
KINDS = ("driver", "group", "Policy", "Critic", "Engine", "hang")
PATIENCE_S = 1800.0
HANGS_AFTER_S = 20.0  # if an engine does not answer for this time, the run treats it as hung
GAP_S = (2.0, 25.0)  # seconds between two faults


def recipe(iterations: int) -> tuple[object, ...]:
    """Returns the arguments of a run that lasts long enough for faults and saves checkpoints often."""
    return (
        "rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", f"iterations={iterations}",
        f"prompts_per_iteration={PROMPTS}", f"rollouts_per_prompt={ROLLOUTS}", "data.eval_limit=4", "eval.every=1000",
        "checkpoint.every=2", "log.trackers=[]", "max_restarts=1000",
        f"rollout.patience_s={HANGS_AFTER_S}",
    )  # fmt: skip


@dataclass
class Faults:
    """The kinds of faults in a run, and how many times the run was resumed."""

    kinds: list[str] = field(default_factory=list)
    resumed: int = 0


def run_with_faults(folder: Path, iterations: int, faults: int, kinds: Sequence[str], rng: random.Random) -> Faults:
    """Makes a complete run and causes at most `faults` faults in it."""
    made = Faults()
    command = Command(*recipe(iterations), "--output", folder)
    deadline = Deadline(PATIENCE_S)
    while True:
        hit_at = time.monotonic() + rng.uniform(*GAP_S)
        while command.process.poll() is None and (len(made.kinds) >= faults or time.monotonic() < hit_at):
            assert not deadline.passed(), f"not done after {PATIENCE_S} s; faults so far: {made.kinds}"
            time.sleep(0.1)
        if command.process.poll() is not None:
            code, _, err = command.finish()
            if code == 0:
                return made
            assert code == -signal.SIGKILL, f"after {made.kinds} the run failed:\n{err}"
            assert command.left_behind(patience=120) == []
            made.resumed += 1
            begun = (folder / "recipe.yaml").exists()
            again = ("rl.run", "--resume", folder) if begun else (*recipe(iterations), "--output", folder)
            command = Command(*again)
        elif kind := strike(command, rng.choice(kinds)):
            made.kinds.append(kind)


def strike(command: Command, kind: str) -> str | None:
    """Causes a fault of this kind and returns the kind. Returns None if the process that the fault needs does
    not exist at the moment."""
    if kind == "driver":
        command.process.kill()
    elif kind == "group":
        os.killpg(command.process.pid, signal.SIGKILL)
    else:
        # Only an engine that samples is stopped. If an engine were stopped while it starts, the run would notice this
        # only after max_start_s (one hour).
        found = named(command, "Engine.stream" if kind == "hang" else kind)
        if not found:
            return None
        os.kill(found[0], signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
    return kind


def differences(calm: Path, faulty: Path, iterations: int, *, exact: bool) -> list[str]:
    """Returns a sentence for each difference between the undisturbed run and the run with faults."""
    found = []
    lines = metrics(faulty)
    if [line["iteration"] for line in lines] != list(range(iterations + 1)):
        found.append(f"metrics.jsonl has iterations {[line['iteration'] for line in lines]}")
    for iteration in range(1, iterations + 1):
        ours, theirs = ([sample["id"] for sample in samples(folder, iteration)] for folder in (faulty, calm))
        if ours != theirs:
            found.append(f"iteration {iteration} has samples of {sorted(set(ours))}, not of {sorted(set(theirs))}")
    if not exact:
        return found
    if without_times(lines) != without_times(metrics(calm)):
        found.append("metrics.jsonl differs")
    for iteration in range(1, iterations + 1):
        name = f"rollouts/{iteration:06d}.jsonl.gz"
        if (faulty / name).read_bytes() != (calm / name).read_bytes():
            found.append(f"{name} differs")
    weights = [load_file(folder / "policy/model.safetensors") for folder in (calm, faulty)]
    if not all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()):
        found.append("the final policy differs")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill processes of a run at random.")
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name:
        calm, faulty = Path(name, "calm"), Path(name, "faulty")
        code, _, err = run(*recipe(options.iterations), "--output", calm, timeout=PATIENCE_S)
        assert code == 0, err
        faults = run_with_faults(faulty, options.iterations, options.faults, options.kinds, random.Random(options.seed))
        exact = not {"Engine", "hang"} & set(faults.kinds)
        found = differences(calm, faulty, options.iterations, exact=exact)
    report = {"faults": faults.kinds, "resumed": faults.resumed, "exact": exact}
    print(json.dumps({**report, "differences": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
