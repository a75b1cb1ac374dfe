"""Decodes the pictures of data rows once, before anything starts, to find damaged pictures and to count conversions.

The result is remembered by digest in a file of the user's cache folder, so that a second start is quick.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from rl.record.remembered import Remembered
from rl.types import BadPicture, Picture


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
    remembered = Remembered("decoded-pictures.txt")  # digest -> conversions, for pictures without damage
    known = (
        {digest: tuple(filter(None, made.split(";"))) for digest, made in remembered.read().items()} if distinct else {}
    )
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
    remembered.add({one.digest: ";".join(known[one.digest]) for one in new if one.digest in known})
    return Decoded(damaged, Counter(name for digest in distinct for name in known.get(digest, ())))


def _decoded(picture: Picture) -> tuple[str, ...] | str:
    """Returns the conversions of a picture, or why it cannot be decoded."""
    name = "one of its pictures" if isinstance(picture.source, bytes) else f"picture {picture.source}"
    try:
        return picture.check()
    except (BadPicture, OSError) as problem:
        return f"{name} cannot be decoded: {problem}"
