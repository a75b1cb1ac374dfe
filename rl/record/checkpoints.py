"""Writes and reads the checkpoints of a run. A checkpoint is a folder that is either complete or absent. No file is a
Python pickle.

    000020/policy/, critic/  complete weights in Hugging Face layout; vLLM can load policy/
           state/            run.json: counters; policy/, critic/: optimizer state of each rank (safetensors)
           manifest.json     size and SHA-256 of every other file; written last

Every random choice of a run depends only on (seed, iteration, position). To resume, a run therefore needs only the
counters, and no random state is saved.
"""

import hashlib
import json
import os
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
    """Duration and size of one finished checkpoint."""

    seconds: float  # time in seconds until everything was on disk
    blocked: float  # the part of `seconds` in which training waited
    bytes: int


class Checkpoints:
    """The checkpoints of one run. A thread writes one checkpoint at a time while training continues.

    Args:
        folder: the folder that contains the checkpoints.
        keep: the number of newest checkpoints that are kept.
        keep_every: a checkpoint whose iteration is a multiple of this number is kept too.
        expected: the estimated size of a checkpoint in bytes. It is used to check the free disk space before the first
            checkpoint.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None, expected: int = 0) -> None:
        self.folder, self.keep, self.keep_every, self.expected = folder, keep, keep_every, expected
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None
        self._written: list[Written] = []

    def begin(self, iteration: int, save: Callable[[Path], tuple[Mapping[str, Any], Finish]]) -> None:
        """Waits until the previous checkpoint is finished, then starts to write the checkpoint of `iteration`.

        Args:
            save: a function that gets the folder to write into. It copies everything that training will change and
                starts to write the copy. It returns the counters for run.json, and a function that waits until
                everything is written.
        Raises: Stop if the disk has too little free space, or if the previous checkpoint could not be written.
        """
        self.settle()
        start = time.monotonic()
        what = f"the checkpoint of iteration {iteration}"
        with writing(what):
            for unfinished in self.folder.glob(".*.partial"):
                shutil.rmtree(unfinished)
        try:
            check_room(self.folder, self.expected, what)
        except NoRoom as problem:
            raise Stop(
                f"{problem}. Reduce checkpoint.keep, make room on the disk, and continue with --resume.", saves=False
            ) from None
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
            except Exception as error:  # the next `settle` or `check` raises this error
                self._failed = not_written(what, error)
                self._failed.__cause__ = error
                return
            self.expected = size
            self._written.append(Written(time.monotonic() - start, blocked, size))
            self._failed = self._delete_old()

        self._thread = threading.Thread(target=write, name=f"checkpoint {iteration}")
        self._thread.start()

    def check(self) -> None:
        """Raises Stop if a checkpoint could not be written."""
        if self._failed:
            failed, self._failed = self._failed, None
            raise failed

    def settle(self) -> None:
        """Waits for the checkpoint that is being written. Raises Stop if it could not be written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def abandon(self) -> None:
        """Waits for the checkpoint that is being written. Raises no error if it could not be written."""
        if self._thread:
            self._thread.join()
        self._thread = self._failed = None

    def take_written(self) -> list[Written]:
        """Returns the checkpoints that were finished since the last call."""
        written, self._written = self._written, []
        return written

    def newest(self, report: Callable[[str], None] = lambda message: None) -> Path | None:
        """Returns the newest undamaged checkpoint, or None if the run has no checkpoint.

        Calls `report` with a message for each damaged checkpoint. Raises Stop if all checkpoints are damaged, because a
        start from iteration 0 would throw away the finished iterations.
        """
        problems = []
        for path in reversed(_numbered(self.folder)):
            if (problem := damage(path)) is None:
                return path
            problems.append(f"checkpoint {path} is damaged and not used: {problem}")
            report(problems[-1])
        if problems:
            raise Stop(
                f"no checkpoint in {self.folder} can be used. The newest checkpoint has this problem: "
                f"{problems[0]}. Restore a checkpoint, or start a new run with another --output.",
                saves=False,
            )
        return None

    def _delete_old(self) -> Stop | None:
        """Deletes old checkpoints. If an old checkpoint cannot be deleted, returns a Stop, which the next `settle` or
        `check` raises. The run must stop because old checkpoints would fill the disk."""
        for old in finished(self.folder)[: -self.keep]:
            if not self.keep_every or int(old.name) % self.keep_every:
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    reason = f"the old checkpoint {old} could not be removed: {error}"
                    return Stop(f"{reason}. Delete this checkpoint, then continue with --resume.", saves=False)
        return None


def finished(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in `folder`, oldest first."""
    return [path for path in _numbered(folder) if (path / MANIFEST).is_file()]


def _numbered(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def damage(checkpoint: Path) -> str | None:
    """Returns a description of the first damaged file of a checkpoint, or None if no file is damaged. Reads all
    files."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        expected = {name: (int(known["bytes"]), str(known["sha256"])) for name, known in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, (size, sha256) in expected.items():
        file = checkpoint / name
        if not os.path.isfile(file):
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if _digest(file) != sha256:
            return f"{name} was changed after it was written (its SHA-256 differs)"
    return None


def counters(checkpoint: Path) -> dict[str, Any]:
    """Returns the content of run.json: the iteration and the counters of the checkpoint."""
    return json.loads((checkpoint / "state" / STATE).read_text())


def publish(folder: Path, target: Path) -> None:
    """Replaces `target` with a copy of a finished folder. Raises Stop if the copy cannot be written."""
    with writing(target), replacing_folder(target) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)


def _write_manifest(folder: Path) -> int:
    """Writes the manifest. Returns the total size, in bytes, of the files in the manifest."""
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
