"""Files and folders that appear whole or not at all, and outlast a power cut once they are there."""

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
    """A disk has less room than what is about to be written."""


def check_room(folder: Path, wanted: int, what: str) -> None:
    """Raises NoRoom, naming the folder and both sizes, if `wanted` bytes do not fit on its disk."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise NoRoom(f"{folder} has {readable(free)} free, and {what} takes about {readable(wanted)}")


@contextlib.contextmanager
def writing(what: object) -> Generator[None, None, None]:
    """Raises Stop, naming `what`, if it cannot be written: the disk is full, or read-only, or broken."""
    try:
        yield
    except OSError as error:
        raise not_written(what, error) from error


def not_written(what: object, error: Exception) -> Stop:
    """Why the run ends."""
    return Stop(f"{what} could not be written: {error}. Make room or mend the folder, and {GO_ON}.", saves=False)


def readable(size: int) -> str:
    """Bytes as a person reads them."""
    number, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.3g} {units[0]}" if units[0] != "bytes" else f"{size} bytes"


def to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names (without which a rename can be undone), is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(folder: Path) -> int | None:
    """Keep a folder for this process until it ends, or closes the descriptor that is returned; None on file systems
    that know no locks. Raises ValueError if another process has it."""
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
    """A file to write that takes `path`'s place, whole and on disk, when the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    to_disk(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Generator[Path, None, None]:
    """A new folder to fill that takes `path`'s place, whole and on disk, when the block ends without an error."""
    partial = begin_folder(path)
    yield partial
    finish_folder(partial, path)


def begin_folder(path: Path) -> Path:
    """An empty folder to fill, which `finish_folder` puts in `path`'s place.

    After an error or a crash what was written stays as `.NAME.partial`, and the next attempt clears it.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """`partial` takes `path`'s place, whole and on disk."""
    for inside in sorted(partial.rglob("*")):
        to_disk(inside)
    to_disk(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)
    to_disk(path.parent)
