"""Remembers results of checks between commands, in files of the user's cache folder.

Nothing depends on these files: without them, a check is made again.
"""

import os
from collections.abc import Mapping
from pathlib import Path

MOST_BYTES = 256 << 20
"""A larger file is not read. It is begun anew."""
KEY_LENGTH = 64  # keys are SHA-256 digests in hexadecimal digits


class Remembered:
    """A file with one line `KEY<tab>TEXT` for each result. `name` is the name of the file."""

    def __init__(self, name: str) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.file = cache / "step3-vl-rl" / name

    def read(self) -> dict[str, str]:
        """Returns key -> text. A file that cannot be read, and damaged lines, count as nothing remembered."""
        try:
            if self.file.stat().st_size > MOST_BYTES:
                self.file.unlink()
                return {}
            lines = self.file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError:
            return {}
        entries = (line.split("\t") for line in lines)
        return {entry[0]: entry[1] for entry in entries if len(entry) == 2 and len(entry[0]) == KEY_LENGTH}

    def add(self, found: Mapping[str, str]) -> None:
        """Appends results. The texts must not contain tabs or line breaks. If the file cannot be written, nothing is
        remembered."""
        if not found:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write("".join(f"{key}\t{text}\n" for key, text in found.items()))
        except OSError:
            return
