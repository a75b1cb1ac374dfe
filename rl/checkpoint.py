"""Checkpoints of a run: a folder per iteration that is complete or absent, and nothing in it is pickled.

    000020/policy/  Hugging Face layout, loads in vLLM
           critic/  weights of the critic
           state/   optimizer moments (safetensors) and run.json: counters that fix everything else

Every random choice of a run is drawn from (seed, iteration, place), so the counters are the random state.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATE = "run.json"


def write(folder: Path, iteration: int, save: Callable[[Path], dict[str, Any]], keep: int) -> Path:
    """Save iteration `iteration` under `folder`, then delete all but the newest `keep`.

    Args:
        save: writes everything into the folder it is given and returns the counters for run.json.
    Returns: the finished checkpoint. It gets its name only when all of it is on disk.
    """
    partial, final = folder / f".{iteration:06d}.partial", folder / f"{iteration:06d}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    counters = save(partial)
    (partial / "state").mkdir(exist_ok=True)
    (partial / "state" / STATE).write_text(json.dumps({"iteration": iteration, **counters}, indent=2) + "\n")
    flush(partial)
    replace(partial, final)
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


def replace(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in place of what had it before; lasting when this returns."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(final.parent)


def publish(folder: Path, target: Path) -> None:
    """Copy a finished folder to `target`, which is complete or absent at any time."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    shutil.copytree(folder, partial)
    flush(partial)
    replace(partial, target)


def flush(folder: Path) -> None:
    """Wait until every file under `folder` is on disk."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
