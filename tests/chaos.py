"""Kills processes of a real run at random moments, and checks that nothing was lost, doubled or changed.

    python -m tests.chaos [--faults 10] [--seed 0] [--kinds driver group Policy Critic Engine hang]

A small run on the CPU profile goes to its end once undisturbed, and once while `faults` blows fall on it: the driver
alone (kill -9), its whole process group, one worker process of the named class, or an engine that is halted instead
while it samples (hang). Whenever the run has ended before its time it is resumed. Both must have every iteration
exactly once with its full set of samples. Unless an engine was struck, whose replacement answers in other batches
(last digits differ), metrics, samples and weights must be the same bit for bit.
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

ITERATIONS, PROMPTS, ROLLOUTS = 12, 8, 4
KINDS = ("driver", "group", "Policy", "Critic", "Engine", "hang")
PATIENCE_S = 1800.0
HANGS_AFTER_S = 20.0
GAP_S = (2.0, 25.0)  # between blows


def recipe(iterations: int) -> tuple[object, ...]:
    """A run that takes long enough to be hit, and saves often."""
    return (
        "rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", f"iterations={iterations}",
        f"prompts_per_iteration={PROMPTS}", f"rollouts_per_prompt={ROLLOUTS}", "data.eval_limit=4", "eval.every=1000",
        "checkpoint.every=2", "log.trackers=[]", "max_restarts=1000",
        f"rollout.patience_s={HANGS_AFTER_S}",
    )  # fmt: skip


@dataclass
class Storm:
    """What has fallen on a run."""

    blows: list[str] = field(default_factory=list)
    resumed: int = 0


def endure(folder: Path, iterations: int, faults: int, kinds: Sequence[str], rng: random.Random) -> Storm:
    """The run from its start to its end under `faults` blows."""
    storm = Storm()
    command = Command(*recipe(iterations), "--output", folder)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        hit_at = time.monotonic() + rng.uniform(*GAP_S)
        while command.process.poll() is None and (len(storm.blows) >= faults or time.monotonic() < hit_at):
            assert time.monotonic() < deadline, f"not done after {PATIENCE_S} s; blows so far: {storm.blows}"
            time.sleep(0.1)
        if command.process.poll() is not None:
            code, _, err = command.finish()
            if code == 0:
                return storm
            assert code == -signal.SIGKILL, f"after {storm.blows} the run gave up:\n{err}"
            assert command.left_behind(patience=120) == []
            storm.resumed += 1
            begun = (folder / "recipe.yaml").exists()
            again = ("rl.run", "--resume", folder) if begun else (*recipe(iterations), "--output", folder)
            command = Command(*again)
        elif blow := strike(command, rng.choice(kinds)):
            storm.blows.append(blow)


def strike(command: Command, kind: str) -> str | None:
    """Kill or halt a process; None if there is none of that kind now."""
    if kind == "driver":
        command.process.kill()
    elif kind == "group":
        os.killpg(command.process.pid, signal.SIGKILL)
    else:
        # one that hangs while it starts is noticed after max_start_s only, an hour
        found = named(command, "Engine.stream" if kind == "hang" else kind)
        if not found:
            return None
        os.kill(found[0], signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
    return kind


def differences(calm: Path, stormy: Path, iterations: int, *, exact: bool) -> list[str]:
    """What is lost, doubled or changed."""
    found = []
    lines = metrics(stormy)
    if [line["iteration"] for line in lines] != list(range(iterations + 1)):
        found.append(f"metrics.jsonl has iterations {[line['iteration'] for line in lines]}")
    for iteration in range(1, iterations + 1):
        ours, theirs = ([sample["id"] for sample in samples(folder, iteration)] for folder in (stormy, calm))
        if ours != theirs:
            found.append(f"iteration {iteration} has samples of {sorted(set(ours))}, not of {sorted(set(theirs))}")
    if not exact:
        return found
    if without_times(lines) != without_times(metrics(calm)):
        found.append("metrics.jsonl differs")
    for iteration in range(1, iterations + 1):
        name = f"rollouts/{iteration:06d}.jsonl.gz"
        if (stormy / name).read_bytes() != (calm / name).read_bytes():
            found.append(f"{name} differs")
    weights = [load_file(folder / "policy/model.safetensors") for folder in (calm, stormy)]
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
        calm, stormy = Path(name, "calm"), Path(name, "stormy")
        code, _, err = run(*recipe(options.iterations), "--output", calm, timeout=PATIENCE_S)
        assert code == 0, err
        storm = endure(stormy, options.iterations, options.faults, options.kinds, random.Random(options.seed))
        exact = not {"Engine", "hang"} & set(storm.blows)
        found = differences(calm, stormy, options.iterations, exact=exact)
    report = {"survived": len(storm.blows), "blows": storm.blows, "resumed": storm.resumed, "exact": exact}
    print(json.dumps({**report, "differences": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
