"""Writes files and folders that are complete or absent, and on disk (fsync) before they get their name.

Tested in tests/rl/record/test_checkpoints.py and tests/rl/record/test_run_folder.py.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import IO

from rl.stop import GO_ON, Stop


class NoRoom(OSError):
    """The disk has less free space than is needed."""


def check_room(folder: Path, wanted: int, what: str) -> None:
    """Raises NoRoom if the folder's disk has less than `wanted` bytes free. `what` is for the message."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise NoRoom(f"{folder} has {readable(free)} free, and {what} takes about {readable(wanted)}")


@contextlib.contextmanager
def writing(what: object) -> Generator[None, None, None]:
    """Turns an OSError in the block, such as a full or read-only disk, into a Stop that names `what`."""
    try:
        yield
    except OSError as error:
        raise not_written(what, error) from error


def not_written(what: object, error: Exception) -> Stop:
    """Returns the Stop to raise for something that cannot be written."""
    return Stop(f"{what} could not be written: {error}. Make room or mend the folder, and {GO_ON}.", saves=False)


def readable(size: int) -> str:
    """Returns a number of bytes with a unit: `3.2 GiB`."""
    number, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.3g} {units[0]}" if units[0] != "bytes" else f"{size} bytes"


def to_disk(path: Path) -> None:
    """Calls fsync on a file or folder. A folder's fsync makes the renames in it permanent."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(folder: Path) -> int | None:
    """Locks a folder for this process. The lock lasts until the returned descriptor is closed or the process ends.

    Returns None on file systems without locks. Raises ValueError if another process has the lock.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise ValueError(f"another run is writing in {folder}; end it first, or give another folder") from None
    return held


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes], None, None]:
    """Yields a file to write. It replaces `path` when the block ends without an error, complete and on disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    to_disk(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, and its folder if it is missing, completely or not at all. Raises Stop if it cannot."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Generator[Path, None, None]:
    """Yields a new folder to fill. It replaces `path` when the block ends without an error, complete and on disk."""
    partial = begin_folder(path)
    yield partial
    finish_folder(partial, path)


def begin_folder(path: Path) -> Path:
    """Returns an empty folder to fill, `.NAME.partial`; `finish_folder` renames it to `path`.

    After an error or a crash it stays, and the next call with the same path deletes it.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """Replaces `path` by the folder `partial`, after everything in it is on disk."""
    for inside in sorted(partial.rglob("*")):
        to_disk(inside)
    to_disk(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)
    to_disk(path.parent)
