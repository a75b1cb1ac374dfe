"""Checkpoints of a run: a folder per iteration that is complete or absent, and nothing in it is pickled.

    000020/policy/  Hugging Face layout, loads in vLLM
           critic/  weights of the critic
           state/   optimizer moments (safetensors) and run.json: counters that fix everything else

Every random choice of a run is drawn from (seed, iteration, place), so the counters are the random state.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.disk import replacing_folder

STATE = "run.json"


def write(folder: Path, iteration: int, save: Callable[[Path], dict[str, Any]], keep: int) -> Path:
    """Save iteration `iteration` under `folder`, then delete all but the newest `keep`.

    Args:
        save: writes everything into the folder it is given and returns the counters for run.json.
    Returns: the finished checkpoint. It gets its name only when all of it is on disk.
    """
    final = folder / f"{iteration:06d}"
    with replacing_folder(final) as partial:
        counted = save(partial)
        (partial / "state").mkdir(exist_ok=True)
        (partial / "state" / STATE).write_text(json.dumps({"iteration": iteration, **counted}, indent=2) + "\n")
    for old in finished(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.isdigit() and (p / "state" / STATE).is_file())


def counters(checkpoint: Path) -> dict[str, Any]:
    """What `write` stored in run.json, with the iteration."""
    return json.loads((checkpoint / "state" / STATE).read_text())


def publish(folder: Path, target: Path) -> None:
    """Copy a finished folder to `target`, in place of what was there."""
    with replacing_folder(target) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
