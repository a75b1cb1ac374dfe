"""Kills processes of a real run at random moments, and checks that the results equal those of an undisturbed run.

    python -m tests.chaos [--faults 10] [--seed 0] [--kinds driver group Policy Critic Engine hang]
                          [--phases any sampling scoring update sync checkpoint] [--busy]

The command makes the same small run of the CPU profile twice: once undisturbed, and once with faults. Most faults send
SIGKILL. The fault `driver` kills only the driver. The fault `group` kills the whole process group of the driver. The
faults `Policy`, `Critic` and `Engine` each kill one worker process of the class with the same name. The fault `hang`
sends SIGSTOP to an engine that is sampling. If a fault ends the run, the run is resumed.

With `--phases`, each fault happens in one of the given phases of an iteration. With `--busy`, another process keeps a
core busy during the run with faults.

Both runs must have every iteration exactly once, with all samples. If no fault was of the kind `Engine` or `hang`, the
metrics, samples and weights of both runs must also be equal bit for bit. After a fault of one of these two kinds, a new
engine answers the remaining requests. The new engine puts these requests into other batches, so the last digits of its
logprobs differ.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from benchmarks.harness import busy_process
from tests.support.command import ROOT, Command, metrics, named, run, samples, without_times
from tests.support.patience import Deadline

PROMPTS, ROLLOUTS = 8, 4
PER_FAULT, LEAST = 5, 12  # number of iterations per fault; minimum number of iterations of a run
SLOW_REWARD = """
import time
from rewards import Rollout, reward


@reward("slow")
def slow(rollout: Rollout) -> float:
    time.sleep(0.2)
    return float(rollout.answer == str(rollout.prompt.ground_truth))
"""
"""A reward that is so slow that faults can happen while an iteration is scored."""
ACTORS = ("Engine", "Policy", "Critic")
METHODS = {
    "sampling": {"Engine.stream"},
    "update": {"Policy.update", "Critic.update"},
    "sync": {"Policy.weights", "Engine.load"},
}
"""Phase -> the methods that run in this phase. The methods have the names that Ray shows in process titles."""
PHASES = ("any", *METHODS, "scoring", "checkpoint")
KINDS = ("driver", "group", "Policy", "Critic", "Engine", "hang")
PATIENCE_S = 1800.0
HANGS_AFTER_S = 20.0  # if an engine does not answer for this time, the run treats it as hung
GAP_S = (1.0, 10.0)  # minimum and maximum number of seconds between two faults
MISSED_S = 15.0  # if the phase has not been seen for this number of seconds, another fault and phase are drawn


def recipe(folder: Path, iterations: int) -> tuple[object, ...]:
    """Returns the command-line arguments of a run that lasts long enough for faults. The run saves checkpoints often,
    and uses the reward in the file slow.py of `folder`."""
    return (
        "rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", f"iterations={iterations}",
        f"prompts_per_iteration={PROMPTS}", f"rollouts_per_prompt={ROLLOUTS}", "data.eval_limit=4", "eval.every=1000",
        "checkpoint.every=2", "log.trackers=[]", "max_restarts=1000",
        f"rollout.patience_s={HANGS_AFTER_S}", f"rewards.counting={{use: {folder}/slow.py:slow}}",
    )  # fmt: skip


@dataclass
class Faults:
    """The faults of a run, each written as "kind in phase", and the number of times that the run was resumed."""

    made: list[str] = field(default_factory=list)
    resumed: int = 0


def run_with_faults(
    folder: Path, iterations: int, faults: int, kinds: Sequence[str], phases: Sequence[str], rng: random.Random
) -> Faults:
    """Starts a run, causes faults, and resumes the run until it is complete. `faults` is the maximum number of
    faults."""
    found = Faults()
    fresh = (*recipe(folder.parent, iterations), "--output", folder)
    command = Command(*fresh)
    deadline = Deadline(PATIENCE_S * (1 + faults / 10))
    while True:
        hit_at, kind, phase = time.monotonic() + rng.uniform(*GAP_S), rng.choice(kinds), rng.choice(phases)
        while command.process.poll() is None:
            assert not deadline.passed(), f"the run takes too long; faults so far: {found.made}"
            if len(found.made) >= faults or time.monotonic() < hit_at:
                time.sleep(0.1)
            elif time.monotonic() > hit_at + MISSED_S:
                break
            elif phase in ("any", *phases_now(command, folder)):
                if strike(command, kind):
                    found.made.append(f"{kind} in {phase}")
                break
        if command.process.poll() is not None:
            code, _, err = command.finish()
            if code == 0:
                return found
            assert code == -signal.SIGKILL, f"after {found.made} the run failed:\n{err}"
            assert command.left_behind(patience=120) == []
            found.resumed += 1
            command = Command(*(("rl.run", "--resume", folder) if (folder / "recipe.yaml").exists() else fresh))


def phases_now(command: Command, folder: Path) -> set[str]:
    """Returns the phases in which the run is now. Ray writes the name of an actor's current method into the title of
    the actor's process."""
    titles = [line.split()[0].removeprefix("ray::") for _, line in command.marked() if line.startswith("ray::")]
    phases = {phase for phase, methods in METHODS.items() if methods & set(titles)}
    if set(ACTORS) <= set(titles):  # the actors are idle, so the driver is waiting for the rewards
        phases.add("scoring")
    # A partial checkpoint that is older than the command does not count: an earlier command has left it.
    started = Path(f"/proc/{command.process.pid}").stat().st_mtime
    if any(_changed_after(started, partial) for partial in (folder / "checkpoints").glob(".*.partial")):
        phases.add("checkpoint")
    return phases


def _changed_after(moment: float, path: Path) -> bool:
    try:
        return path.stat().st_mtime > moment
    except FileNotFoundError:  # the checkpoint is complete, and has its final name now
        return False


def strike(command: Command, kind: str) -> bool:
    """Causes a fault of the given kind. Returns False if the run has no process for such a fault at the moment."""
    if kind == "driver":
        command.process.kill()
    elif kind == "group":
        os.killpg(command.process.pid, signal.SIGKILL)
    else:
        # The fault `hang` stops only an engine that is sampling. If an engine were stopped while it starts, the run
        # would notice the fault only after max_start_s (one hour).
        found = named(command, "Engine.stream" if kind == "hang" else kind)
        if not found:
            return False
        os.kill(found[0], signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
    return True


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
    parser.add_argument("--iterations", type=int, help="default: enough for the faults")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["any"])
    parser.add_argument("--busy", action="store_true", help="keep a core busy while faults occur")
    options = parser.parse_args(arguments)
    iterations = options.iterations or max(LEAST, PER_FAULT * options.faults)
    with TemporaryDirectory() as name:
        calm, faulty = Path(name, "calm"), Path(name, "faulty")
        Path(name, "slow.py").write_text(SLOW_REWARD)
        code, _, err = run(*recipe(Path(name), iterations), "--output", calm, timeout=PATIENCE_S)
        assert code == 0, err
        with busy_process() if options.busy else nullcontext():
            rng = random.Random(options.seed)
            found = run_with_faults(faulty, iterations, options.faults, options.kinds, options.phases, rng)
        exact = not any(fault.startswith(("Engine", "hang")) for fault in found.made)
        differing = differences(calm, faulty, iterations, exact=exact)
        if len(found.made) < options.faults:
            differing.append(f"the run ended after {len(found.made)} of {options.faults} faults")
    print(
        json.dumps({"faults": Counter(found.made), "resumed": found.resumed, "exact": exact, "differences": differing})
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
