"""Caches the features of the frozen encoder. Each distinct picture is encoded once, for policy and critic together."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from rl.learner.clients import EncoderClient
from rl.types import Picture


class FeatureStore:
    """Stores the features of encoded pictures. Policy and critic read the features from this store in every pass.

    The features are in Ray's object store, which moves objects to disk if they do not fit into memory. If the features
    exceed the limit, the least recently used features are dropped. Dropped features are computed again when they are
    needed.

    Args:
        encoders: clients of the processes that encode pictures. The clients are used in turn.
        limit_mib: the maximum size of the stored features in MiB, in memory and on disk together.
    """

    def __init__(self, encoders: Sequence[EncoderClient], limit_mib: int) -> None:
        self._encoders, self._limit = list(encoders), limit_mib << 20
        self._features: OrderedDict[str, Any] = OrderedDict()  # digest -> future of features, most recently used last
        self._bytes: dict[str, int] = {}
        self._requests = 0
        self.forwards = 0  # the number of pictures encoded so far, updated by `trim`

    def of(self, pictures: Iterable[Picture]) -> dict[str, Any]:
        """Returns {digest of a picture: future of its features [image tokens, hidden]} for all `pictures`."""
        result = {}
        for picture in pictures:
            pending = self._features.pop(picture.digest, None)
            if pending is None:
                # Each call encodes one picture, so that the last bits of its features do not depend on other pictures.
                # Otherwise a resumed run, whose cache is empty, would differ from a run that was never interrupted.
                pending = self._encoders[self._requests % len(self._encoders)].encode(picture)
                self._requests += 1
            self._features[picture.digest] = result[picture.digest] = pending
        return result

    def trim(self, using: Iterable[str] = ()) -> None:
        """Drops the least recently used features until the other features fit into the limit. Never drops features
        whose digest is in `using`."""
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
