"""Features of the frozen encoder: computed once per distinct picture, and kept where the learner's processes can
read them."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from rl.learner.clients import EncoderClient
from rl.types import Picture


class FeatureStore:
    """Knows which pictures have been encoded; policy and critic read the features in every pass of every iteration.

    The features are in Ray's object store, which moves what does not fit into memory to disk. Past the limit the
    least recently used are forgotten, and computed again if they are asked for.

    Args:
        encoders: take pictures in turn.
        limit_mib: of features, in memory and on disk; those of the last request always stay.
    """

    def __init__(self, encoders: Sequence[EncoderClient], limit_mib: int) -> None:
        self._encoders, self._limit = list(encoders), limit_mib << 20
        self._kept: OrderedDict[str, Any] = OrderedDict()  # digest -> pending features, the last used at the end
        self._bytes: dict[str, int] = {}
        self._asked = 0
        self.forwards = 0  # pictures that went through the tower, as far as `trim` has heard

    def of(self, pictures: Iterable[Picture]) -> dict[str, Any]:
        """Digest -> features [image tokens, hidden], each possibly still being computed."""
        result = {}
        for picture in pictures:
            pending = self._kept.pop(picture.digest, None)
            if pending is None:
                # One by one: a picture's features must not depend, in their last bits, on what was asked with it or
                # was still kept, or a resumed run would differ from one never interrupted.
                pending = self._encoders[self._asked % len(self._encoders)].encode(picture)
                self._asked += 1
            self._kept[picture.digest] = result[picture.digest] = pending
        return result

    def trim(self, using: Iterable[str] = ()) -> None:
        """Forget the least recently used beyond the limit, but none of the digests in `using`."""
        for sizes in [encoder.encoded() for encoder in self._encoders]:
            found = sizes.result()
            self.forwards += len(found)
            self._bytes |= dict(found)
        held = sum(self._bytes[digest] for digest in self._kept)
        stay = set(using)
        for digest in [d for d in self._kept if d not in stay]:
            if held <= self._limit:
                return
            del self._kept[digest]
            held -= self._bytes.pop(digest)
