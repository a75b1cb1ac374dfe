"""Decodes the pictures of data rows once, before anything starts, to find damaged pictures and to count conversions.

The result is remembered by digest in a file of the user's cache folder, so that a second start is quick.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from rl.types import BadPicture, Picture

MOST_REMEMBERED_BYTES = 256 << 20
"""If the file of remembered pictures is larger, it is not read, and begun anew."""


@dataclass(frozen=True)
class Decoded:
    """What decoding the pictures has shown: digest -> problem for pictures that cannot be decoded, and the number of
    pictures for each conversion (see rl/pixels.py)."""

    damaged: Mapping[str, str] = field(default_factory=dict)
    conversions: Mapping[str, int] = field(default_factory=dict)


def decode_all(pictures: Iterable[Picture]) -> Decoded:
    """Decodes every picture that is not remembered, with all CPU cores. Shows a progress bar on a terminal. The pixels
    are not kept."""
    distinct = {picture.digest: picture for picture in pictures}
    known = _remembered() if distinct else {}
    new = [picture for digest, picture in distinct.items() if digest not in known]
    damaged: dict[str, str] = {}
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        results = threads.map(_decoded, new)
        shown = track(
            zip(new, results, strict=True), "checking pictures", total=len(new), console=Console(stderr=True),
            transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        for picture, result in shown:
            if isinstance(result, str):
                damaged[picture.digest] = result
            else:
                known[picture.digest] = result
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C, the other pictures are not decoded
    _remember({one.digest: known[one.digest] for one in new if one.digest in known})
    return Decoded(damaged, Counter(name for digest in distinct for name in known.get(digest, ())))


def _decoded(picture: Picture) -> tuple[str, ...] | str:
    """Returns the conversions of a picture, or why it cannot be decoded."""
    name = "one of its pictures" if isinstance(picture.source, bytes) else f"picture {picture.source}"
    try:
        return picture.check()
    except (BadPicture, OSError) as problem:
        return f"{name} cannot be decoded: {problem}"


def remembered_file() -> Path:
    """The file with one line `DIGEST<tab>CONVERSION;CONVERSION` for each picture that was decoded without an error."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step3-vl-rl" / "decoded-pictures.txt"


def _remembered() -> dict[str, tuple[str, ...]]:
    """Returns digest -> conversions. A file that cannot be read, and damaged lines, count as nothing remembered."""
    file = remembered_file()
    try:
        if file.stat().st_size > MOST_REMEMBERED_BYTES:
            file.unlink()
            return {}
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return {}
    entries = (line.split("\t") for line in lines)
    return {
        entry[0]: tuple(filter(None, entry[1].split(";")))
        for entry in entries
        if len(entry) == 2 and len(entry[0]) == 64
    }


def _remember(found: Mapping[str, tuple[str, ...]]) -> None:
    """Adds lines to the file. If this is not possible, the next start decodes the pictures again."""
    if not found:
        return
    text = "".join(f"{digest}\t{';'.join(made)}\n" for digest, made in found.items())
    file = remembered_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text)
    except OSError:
        return
