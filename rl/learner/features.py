"""Cache of the frozen encoder's features: each distinct picture is encoded once, and policy and critic read the
result."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from rl.learner.clients import EncoderClient
from rl.types import Picture


class FeatureStore:
    """The pictures that have been encoded, and their features, which every pass of policy and critic reads.

    The features are in Ray's object store, which moves to disk what does not fit into memory. Beyond the limit the
    least recently used features are dropped; they are computed again when they are needed.

    Args:
        encoders: processes that encode the pictures in turn.
        limit_mib: the most MiB of features that are kept, in memory and on disk.
    """

    def __init__(self, encoders: Sequence[EncoderClient], limit_mib: int) -> None:
        self._encoders, self._limit = list(encoders), limit_mib << 20
        self._features: OrderedDict[str, Any] = OrderedDict()  # digest -> pending features, the last used at the end
        self._bytes: dict[str, int] = {}
        self._requests = 0
        self.forwards = 0  # pictures that have been encoded, counted by `trim`

    def of(self, pictures: Iterable[Picture]) -> dict[str, Any]:
        """Returns digest -> future of the features [image tokens, hidden]."""
        result = {}
        for picture in pictures:
            pending = self._features.pop(picture.digest, None)
            if pending is None:
                # One picture per call: the last bits of its features must not depend on the other pictures of a call,
                # or a resumed run, whose cache is empty, would differ from one that was never interrupted.
                pending = self._encoders[self._requests % len(self._encoders)].encode(picture)
                self._requests += 1
            self._features[picture.digest] = result[picture.digest] = pending
        return result

    def trim(self, using: Iterable[str] = ()) -> None:
        """Drops the least recently used features beyond the limit, but not those of the digests in `using`."""
        for sizes in [encoder.encoded() for encoder in self._encoders]:
            encoded = sizes.result()
            self.forwards += len(encoded)
            self._bytes |= dict(encoded)
        total = sum(self._bytes[digest] for digest in self._features)
        in_use = set(using)
        for digest in [d for d in self._features if d not in in_use]:
            if total <= self._limit:
                return
            del self._features[digest]
            total -= self._bytes.pop(digest)
