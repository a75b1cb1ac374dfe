"""Mounts a real file system of a few MiB, which can be made read-only. Needs the permission to mount."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """Mounts a new disk at `folder`, and unmounts it at the end. Skips the test if mounting is not allowed."""
    folder.mkdir()
    if _mount("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder).returncode:
        pytest.skip("mounting a disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def change(folder: Path, options: str) -> None:
    """Changes mount options of the disk, for example `ro`, `rw` or `size=100m`."""
    done = _mount("-o", f"remount,{options}", folder)
    assert done.returncode == 0, done.stderr


def _mount(*arguments: object) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
