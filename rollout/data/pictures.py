"""Decodes the pictures of data rows once, before anything starts, to find damaged pictures and to count conversions.

The result is remembered by digest in a file of the user's cache folder, so that a second start is quick. `PictureWatch`
finds pictures that become unreadable during a run.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from rl.record.remembered import Remembered
from rl.types import BadPicture, Picture, Prompt


@dataclass(frozen=True)
class Decoded:
    """What decoding the pictures has shown: digest -> problem for pictures that cannot be decoded, and the number of
    pictures for each conversion (see rl/pixels.py)."""

    damaged: Mapping[str, str] = field(default_factory=dict)
    conversions: Mapping[str, int] = field(default_factory=dict)


def decode_all(pictures: Iterable[Picture], most: int | None = None) -> Decoded:
    """Decodes every picture that is not remembered, with all CPU cores. Shows a progress bar on a terminal. The pixels
    are not kept.

    If `most` is given, only this number of distinct pictures is checked. They are the pictures with the smallest
    digests, which is a random sample.
    """
    distinct = {picture.digest: picture for picture in pictures}
    if most is not None:
        distinct = {digest: distinct[digest] for digest in sorted(distinct)[:most]}
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


@dataclass
class PictureWatch:
    """Finds rows whose pictures have become unreadable since the rows were read.

    Args:
        decodes: True if pictures must be decoded when they are first used, because not all pictures were decoded
            before.
    """

    decodes: bool = False
    _stats: dict[Picture, tuple[int, int] | None] = field(default_factory=dict)  # file size, time of last change

    def unreadable(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        """Returns {index of a prompt: reason} for the prompts with a picture that cannot be read any more. A picture
        whose file has not changed since the last call is not opened."""
        pictures = list({picture: None for prompt in prompts for picture in prompt.images})
        if not pictures:
            return {}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            reasons = dict(zip(pictures, threads.map(self._problem, pictures), strict=True))
        lost = {n: next((reasons[p] for p in one.images if reasons[p]), "") for n, one in enumerate(prompts)}
        return {number: why for number, why in lost.items() if why}

    def _problem(self, picture: Picture) -> str:
        """Returns why a picture cannot be read, or ""."""
        try:
            stat = None if isinstance(picture.source, bytes) else picture.source.stat()
            now = (stat.st_size, stat.st_mtime_ns) if stat else None
            is_new = picture not in self._stats
            if not is_new and self._stats[picture] != now and self._digest_changed(picture):
                return f"picture {picture.source} was replaced by another picture after the run had started"
            if self.decodes if is_new else self._stats[picture] != now:
                picture.check()
        except (BadPicture, OSError) as problem:
            name = picture.digest[:12] if isinstance(picture.source, bytes) else picture.source
            return f"picture {name} cannot be read: {problem}"
        self._stats[picture] = now
        return ""

    @staticmethod
    def _digest_changed(picture: Picture) -> bool:
        return Picture.of(picture.source, picture.upright).digest != picture.digest
