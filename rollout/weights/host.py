"""Weight transfer backend "host": moves weights into a running vLLM through the machine's shared memory.

The sender copies tensors into a shared-memory segment and tells the workers the segment's name. Each worker attaches to
the segment, copies the tensors to its device and loads them. Sender and workers must run on one machine. They may run
in the same process (as in rollout/vllm/engine.py) or in different processes, because a segment is found by its name.
Tensor-parallel workers read the whole tensors, and vLLM's loaders take the shards that each worker needs.

Tested in tests/rollout/vllm/test_engine.py.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

Weight = np.ndarray | Tensor
SEGMENT_BYTES = 256 * 2**20  # maximum size of a batch of tensors; a tensor that is larger is sent alone, in one batch
ALIGNMENT = 64
SHARED_MEMORY_FOLDER = "/dev/shm"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Has no fields, because workers find each segment by its name."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """The name of a segment, and the places of the tensors in it.

    `tensors` has one `{"name", "dtype", "shape", "offset"}` per tensor. These values are the name in the model files,
    the torch dtype without "torch.", the shape, and the index of the tensor's first byte in the segment.
    """

    segment: str
    tensors: list[dict[str, Any]]


class Receiver(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """The part of the backend that runs in a worker process of vLLM. It attaches to segments and loads their tensors,
    layer by layer."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Does nothing, because there is no connection to open."""

    def start_weight_update(self) -> None:
        """Restores the weight loaders of the layers. vLLM removed them when it repacked the weights."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        """Copies the segment's tensors to this worker's device and loads them.

        Raises FileNotFoundError if the segment is not on this machine.
        """
        model: Any = self.model  # Any, because its declared type (torch's Module) has no load_weights
        segment = SharedMemory(name=update_info.segment)
        try:
            # Tensors are copied because vLLM keeps them until the whole layer has arrived. The rest of the layer may
            # come with the next segment, when this segment no longer exists.
            model.load_weights(
                (str(tensor["name"]), _view(segment, tensor).to(self.device, copy=True))
                for tensor in update_info.tensors
            )
        finally:
            segment.close()

    def finish_weight_update(self) -> None:
        """Repacks the layers. Raises RuntimeError if a layer received only part of its tensors."""
        partial = list(_partly_loaded(self.model))
        finalize_layerwise_reload(self.model, self.model_config)
        if partial:
            raise RuntimeError(
                f"weight update is incomplete: {partial[0]} and {len(partial) - 1} more layers got only some of "
                "their tensors; send all tensors of a layer (q, k and v together, gate and up together)"
            )

    def shutdown(self) -> None:
        """Does nothing, because this object has no open resources between updates."""


class Sender:
    """The part of the backend that sends weights. base.Sender describes the methods."""

    def init_info(self) -> dict[str, Any]:
        return {}

    def send(self, weights: Mapping[str, Weight], update: Callable[[dict[str, Any]], None]) -> None:
        for batch in batches(weights):
            with shared(batch) as update_info:
                update(update_info)


def _partly_loaded(model: torch.nn.Module) -> Iterator[str]:
    """Yields the names of layers that received only some of their tensors. vLLM would fill the missing tensors from
    uninitialised memory."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        padded = isinstance(layer, VocabParallelEmbedding)  # with vLLM's padding, a layer never looks complete
        if not padded and info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0):
            yield name


def batches(weights: Mapping[str, Weight]) -> Iterator[dict[str, Weight]]:
    """Splits `weights` into batches of up to SEGMENT_BYTES. The order of the tensors is kept."""
    batch: dict[str, Weight] = {}
    room = SEGMENT_BYTES
    for name, weight in weights.items():
        if batch and weight.nbytes > room:
            yield batch
            batch, room = {}, SEGMENT_BYTES
        batch[name] = weight
        room -= _aligned(weight.nbytes)
    if batch:
        yield batch


@contextmanager
def shared(weights: Mapping[str, Weight]) -> Iterator[dict[str, Any]]:
    """A context manager that creates a segment with a copy of the weights. Yields the fields of HostUpdateInfo.

    The segment is removed at the end, even after an error. Raises RuntimeError if the machine has too little free
    shared memory. Without this check, the write would kill the process without a message.
    """
    slots, size = _layout(weights)
    _require_shared_memory(size)
    segment = SharedMemory(create=True, size=size)
    try:
        for slot in slots:
            _write(segment, slot, weights[slot["name"]])
        yield {"segment": segment.name, "tensors": slots}
    finally:
        segment.close()
        segment.unlink()


def _layout(weights: Mapping[str, Weight]) -> tuple[list[dict[str, Any]], int]:
    """Returns the entries of `HostUpdateInfo.tensors`, and the total number of bytes of the tensors."""
    slots, offset = [], 0
    for name, weight in weights.items():
        dtype = str(weight.dtype).removeprefix("torch.")  # without this prefix, torch's names are the same as numpy's
        slots.append({"name": name, "dtype": dtype, "shape": list(weight.shape), "offset": offset})
        offset += _aligned(weight.nbytes)
    return slots, offset


def _write(segment: SharedMemory, slot: Mapping[str, Any], weight: Weight) -> None:
    if isinstance(weight, Tensor):
        _view(segment, slot).copy_(weight.detach())
    else:  # numpy makes the copy, because torch warns about read-only arrays, such as arrays from Ray
        np.copyto(np.ndarray(weight.shape, weight.dtype, segment.buf, slot["offset"]), weight)


def _view(segment: SharedMemory, slot: Mapping[str, Any]) -> Tensor:
    """Returns a tensor in the segment's own memory. The caller must delete the tensor before the segment is closed."""
    dtype, shape = getattr(torch, slot["dtype"]), slot["shape"]
    flat = torch.frombuffer(segment.buf, dtype=dtype, count=math.prod(shape), offset=slot["offset"])
    return flat.view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _require_shared_memory(size: int) -> None:
    stat = os.statvfs(SHARED_MEMORY_FOLDER)
    free = stat.f_bavail * stat.f_frsize
    if size > free:
        raise RuntimeError(
            f"sending weights needs {size / 2**20:.0f} MiB of shared memory but {SHARED_MEMORY_FOLDER} has "
            f"{free / 2**20:.0f} MiB free; provide more shared memory (docker run --shm-size=...)"
        )
