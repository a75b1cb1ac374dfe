"""Checkpoints of a run: a folder per iteration that is complete or absent, and nothing in it is pickled.

    000020/policy/, critic/  whole weights in Hugging Face layout; policy/ loads in vLLM
           state/            run.json: counters; policy/, critic/: what each rank keeps of the optimizer (safetensors)
           manifest.json     size and SHA-256 of every other file; written last

Every random choice of a run is drawn from (seed, iteration, place), so the counters are the random state.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.record.disk import NoRoom, begin_folder, check_room, finish_folder, not_written, replacing_folder, writing
from rl.stop import Stop

STATE, MANIFEST = "run.json", "manifest.json"
Finish = Callable[[], None]


@dataclass(frozen=True)
class Written:
    """What one checkpoint took."""

    seconds: float  # until all of it was on disk
    blocked: float  # of which the run waited
    bytes: int


class Checkpoints:
    """Those of one run. One at a time is written in a thread, while training goes on.

    Args:
        folder: where they are.
        keep: newest checkpoints that stay.
        keep_every: those of iterations that it divides stay as well.
        expected: bytes that one takes, as far as it can be known before the first is written.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None, expected: int = 0) -> None:
        self.folder, self.keep, self.keep_every, self.expected = folder, keep, keep_every, expected
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None
        self._written: list[Written] = []

    def begin(self, iteration: int, save: Callable[[Path], tuple[Mapping[str, Any], Finish]]) -> None:
        """Save `iteration`, once the one before is done.

        Args:
            save: copies everything that training will change, begins to write it into the folder it is given, and
                returns the counters for run.json and a function that waits until all is written.
        Raises: Stop if the disk has too little room, or if the checkpoint before could not be written.
        """
        self.settle()
        start = time.monotonic()
        what = f"the checkpoint of iteration {iteration}"
        with writing(what):
            for broken_off in self.folder.glob(".*.partial"):
                shutil.rmtree(broken_off)
        try:
            check_room(self.folder, self.expected, what)
        except NoRoom as problem:
            raise Stop(f"{problem}. Lower checkpoint.keep, make room, and go on with --resume.", saves=False) from None
        final = self.folder / f"{iteration:06d}"
        with writing(what):
            partial = begin_folder(final)
            counters, finish = save(partial)
        blocked = time.monotonic() - start

        def write() -> None:
            try:
                finish()
                (partial / "state").mkdir(exist_ok=True)
                _write_json(partial / "state" / STATE, {"iteration": iteration, **counters})
                size = _write_manifest(partial)
                finish_folder(partial, final)
            except Exception as error:  # told by the next `settle` or `check`
                self._failed = not_written(what, error)
                self._failed.__cause__ = error
                return
            self.expected = size
            self._written.append(Written(time.monotonic() - start, blocked, size))
            self._failed = self._forget_old()

        self._thread = threading.Thread(target=write, name=f"checkpoint {iteration}")
        self._thread.start()

    def check(self) -> None:
        """Raises Stop if a checkpoint could not be written."""
        if self._failed:
            failed, self._failed = self._failed, None
            raise failed

    def settle(self) -> None:
        """Waits for the one that is being written. Raises Stop if it could not be."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def abandon(self) -> None:
        """Wait for the one that is being written, and forget if it could not be."""
        if self._thread:
            self._thread.join()
        self._thread = self._failed = None

    def told(self) -> list[Written]:
        """Those finished since this was asked last."""
        told, self._written = self._written, []
        return told

    def newest(self, say: Callable[[str], None] = lambda message: None) -> Path | None:
        """The last one that is whole, None if there is not any; `say` is told of each that is damaged.

        Raises: Stop if all are damaged. To start anew would throw away what the run has finished.
        """
        found = _numbered(self.folder)
        problems = []
        for path in reversed(found):
            if (problem := damage(path)) is None:
                return path
            problems.append(f"checkpoint {path} is damaged and not used: {problem}")
            say(problems[-1])
        if problems:
            raise Stop(
                f"no checkpoint in {self.folder} can be used, the newest because: {problems[0]}. Bring one back, or "
                "start a new run with another --output.",
                saves=False,
            )
        return None

    def _forget_old(self) -> Stop | None:
        """Returns why the run must not go on, if one cannot be removed: they would fill the disk."""
        for old in finished(self.folder)[: -self.keep]:
            if not self.keep_every or int(old.name) % self.keep_every:
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    why = f"the old checkpoint {old} could not be removed: {error}. Mend that and go on with --resume."
                    return Stop(why, saves=False)
        return None


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in _numbered(folder) if (path / MANIFEST).is_file()]


def _numbered(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads all of them."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, known in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != known["bytes"]:
            return f"{name} has {size} bytes instead of {known['bytes']}"
        if _digest(file) != known["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def counters(checkpoint: Path) -> dict[str, Any]:
    """What was stored in run.json, with the iteration."""
    return json.loads((checkpoint / "state" / STATE).read_text())


def publish(folder: Path, target: Path) -> None:
    """Copy a finished folder to `target`, in place of what was there. Raises Stop if that cannot be written."""
    with writing(target), replacing_folder(target) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)


def _write_manifest(folder: Path) -> int:
    """Returns the bytes of all files."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    _write_json(folder / MANIFEST, {"files": files})
    return sum(one["bytes"] for one in files.values())


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
