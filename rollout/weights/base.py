"""Selects the backend that transfers trained weights into a running vLLM, and defines the interface of all backends.

A backend is a file in this folder with two classes. `Sender` runs in the process of rollout/vllm/engine.py. `Receiver`
runs in each of vLLM's worker processes and is a `WeightTransferEngine` of vLLM's own API. When this file is imported,
no backend is imported. Tested in tests/rollout/vllm/test_engine.py.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BACKEND = "host"
"""The backend that engines use. Its file and its entry in vLLM's registry both have this name."""
MODULE = f"rollout.weights.{BACKEND}"


class Sender(Protocol):
    """The part of a backend that sends weights."""

    def init_info(self) -> dict[str, Any]:
        """Returns the fields of Receiver.init_info_cls. Each worker needs these fields to connect to this sender."""
        ...

    def send(self, weights: "Mapping[str, np.ndarray | Tensor]", update: Callable[[dict[str, Any]], None]) -> None:
        """Sends tensors in one or more batches.

        Args:
            weights: name in the model files -> full tensor.
            update: is called once per batch with the fields of Receiver.update_info_cls. The call returns when every
                worker has loaded the batch.
        """
        ...


def make_sender() -> Sender:
    """Returns a new Sender of the backend in use. Imports vLLM."""
    return cast(Sender, import_module(MODULE).Sender())
