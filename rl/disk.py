"""Files and folders that appear whole or not at all, and outlast a power cut once they are there."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import IO


def to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names (without which a rename can be undone), is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    """A new folder to fill that takes `path`'s place, whole and on disk, when the block ends without an error.

    After an error or a crash what was written stays as `.NAME.partial`, and the next attempt clears it.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    for inside in sorted(partial.rglob("*")):
        to_disk(inside)
    to_disk(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)
    to_disk(path.parent)
