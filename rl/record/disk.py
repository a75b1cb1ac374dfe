"""Writes files and folders so that each of them is either complete or absent. A file or folder gets its final name only
when all of it is on disk (fsync).

Tested in tests/rl/record/test_checkpoints.py and tests/rl/record/test_run_folder.py.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Generator
from pathlib import Path
from typing import IO, AnyStr

from rl.stop import GO_ON, Stop

LOCK = ".lock"


class NoRoom(OSError):
    """The disk has less free space than is needed."""


def check_room(folder: Path, wanted: int, what: str) -> None:
    """Raises NoRoom if the folder's disk has less than `wanted` bytes of free space. The message says that `what` needs
    the space."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise NoRoom(f"{folder} has {readable(free)} free, and {what} takes about {readable(wanted)}")


@contextlib.contextmanager
def writing(what: object) -> Generator[None, None, None]:
    """Converts an OSError in the `with` block, such as the error of a full disk, to a Stop. The message of the Stop
    says that `what` could not be written."""
    try:
        yield
    except OSError as error:
        raise not_written(what, error) from error


def not_written(what: object, error: Exception) -> Stop:
    """Returns a Stop which says that `what` could not be written. The caller must raise this Stop."""
    return Stop(
        f"{what} could not be written: {error}. Make room on the disk or repair the folder, and {GO_ON}.", saves=False
    )


def readable(size: int) -> str:
    """Returns a number of bytes with a unit, such as `3.2 GiB`."""
    number, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.3g} {units[0]}" if units[0] != "bytes" else f"{size} bytes"


def to_disk(path: Path) -> None:
    """Calls fsync on a file or folder. After fsync on a folder, renames inside the folder are permanent."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(folder: Path) -> IO[bytes]:
    """Locks a folder for this process, with a file LOCK in it. The lock ends when the returned file is closed, or when
    the process ends.

    Raises ValueError if another process has the lock.
    """
    file = (folder / LOCK).open("ab")  # NFS needs a file that is open for writing
    return hold_file(file, f"another run is writing in {folder}; end that run first, or give another folder")


def hold_file(file: IO[AnyStr], held: str) -> IO[AnyStr]:
    """Locks a file that is open for writing, and returns it. If the file system has no locks, prints a warning.

    Raises ValueError with the message `held`, and closes the file, if another process has the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise ValueError(held) from None
        print(
            f"warning: the file system of {file.name} has no locks ({error.strerror}), so make sure that no second "
            "command writes there",
            file=sys.stderr,
        )
    return file


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes], None, None]:
    """Yields a temporary file to write to. If the `with` block ends without an error, the file is flushed to disk and
    then replaces `path`."""
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
    """Writes a file completely or not at all. Makes the folder of the file if it is missing. Raises Stop if the file
    cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Generator[Path, None, None]:
    """Yields a new folder to write files into. If the `with` block ends without an error, the folder is flushed to disk
    and then replaces `path`."""
    partial = begin_folder(path)
    yield partial
    finish_folder(partial, path)


def begin_folder(path: Path) -> Path:
    """Makes an empty folder `.NAME.partial` and returns its path. When all files are in this folder, `finish_folder`
    renames it to `path`.

    After an error or a crash this folder still exists. The next call with the same path deletes it.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """Flushes the folder `partial` to disk and then renames it to `path`. Deletes an older folder at `path` first."""
    for inside in sorted(partial.rglob("*")):
        to_disk(inside)
    to_disk(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)
    to_disk(path.parent)
