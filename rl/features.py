"""Features of the frozen encoder, computed once per distinct picture and kept while there is room."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from rl.types import Picture


class FrozenFeatures:
    """A least-recently-used cache from picture digests to features.

    Args:
        encode: pictures -> one [image tokens, hidden] tensor each.
        limit_mib: memory for features; those of the request at hand are always given, over the limit or not.
    """

    def __init__(self, encode: Callable[[Sequence[Image.Image]], list[Tensor]], limit_mib: int) -> None:
        self._encode, self._limit = encode, limit_mib << 20
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.forwards = 0  # pictures that went through the tower

    @torch.no_grad()
    def of(self, pictures: Mapping[str, Picture]) -> dict[str, Tensor]:
        """Digest -> [image tokens, hidden] on the CPU."""
        result = {}
        for digest, picture in pictures.items():
            # One at a time: a picture's features must not depend, in their last bits, on what was asked with it
            # or was still in the cache, or a resumed run would differ from one never interrupted.
            feature = self._kept.pop(digest) if digest in self._kept else self._made(picture)
            self._kept[digest] = result[digest] = feature
        self._shrink()
        return result

    def _made(self, picture: Picture) -> Tensor:
        self.forwards += 1
        return self._encode([picture.load()])[0].cpu()

    def _shrink(self) -> None:
        size = sum(f.nbytes for f in self._kept.values())
        while size > self._limit and self._kept:
            size -= self._kept.popitem(last=False)[1].nbytes
