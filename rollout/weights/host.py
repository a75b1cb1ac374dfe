"""Trained weights into a running vLLM through shared memory of the host.

A weight-transfer engine for vLLM's public API (`WeightTransferEngineFactory`), backend "host". The sender copies
tensors into a shared-memory segment and names it; each worker attaches, copies the tensors to its device and
hands them to the model. Segments are named, not inherited, so this holds for a worker in the sender's process
(as rollout/vllm/engine.py runs it) and for any other worker process on the same machine, tensor-parallel ones
included: each reads the whole tensors, and vLLM's loaders take their own shard. It does not cross machines.
"""

import math
import os
from collections.abc import Iterator, Mapping
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
SEGMENT_BYTES = 256 * 2**20  # tensors are sent in batches of about this size; a larger tensor goes alone
ALIGNMENT = 64
SHARED_MEMORY_FOLDER = "/dev/shm"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One batch of tensors in one segment.

    `tensors` has one `{"name", "dtype", "shape", "offset"}` per tensor: name on disk, torch dtype without
    "torch.", shape, and the tensor's first byte in the segment.
    """

    segment: str
    tensors: list[dict[str, Any]]


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """The worker's end: attaches to named segments and loads what they hold, layer by layer."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Give layers back the loaders that their repacking took away."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        """Copy the segment's tensors to this worker's device and load them.

        Raises FileNotFoundError if the segment is not on this machine.
        """
        model: Any = self.model  # torch's type does not tell that vLLM's models load weights
        segment = SharedMemory(name=update_info.segment)
        try:
            # Copies: vLLM keeps a tensor until its whole layer has arrived, maybe in a later segment.
            model.load_weights(
                (str(tensor["name"]), _view(segment, tensor).to(self.device, copy=True))
                for tensor in update_info.tensors
            )
        finally:
            segment.close()

    def finish_weight_update(self) -> None:
        """Repack the layers. Raises RuntimeError if a layer got only part of its tensors."""
        partial = list(_partly_loaded(self.model))
        finalize_layerwise_reload(self.model, self.model_config)
        if partial:
            raise RuntimeError(
                f"weight update is incomplete: {partial[0]} and {len(partial) - 1} more layers got only some of "
                "their tensors; send all tensors of a layer (q, k and v together, gate and up together)"
            )

    def shutdown(self) -> None:
        """Holds nothing between updates."""


def _partly_loaded(model: torch.nn.Module) -> Iterator[str]:
    """Names of layers that vLLM would complete from uninitialised memory."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        padded = isinstance(layer, VocabParallelEmbedding)  # vocabulary rounded up: never "complete"
        if not padded and info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0):
            yield name


def batches(weights: Mapping[str, Weight]) -> Iterator[dict[str, Weight]]:
    """`weights` in their order, in batches of up to SEGMENT_BYTES."""
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
    """Copy weights into a new segment for the length of a `with`; yields the update_info that names them.

    The segment is gone afterwards whatever happened. Raises RuntimeError if the machine's shared memory is too
    small: writing beyond it would kill the process without a message.
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
    """One slot per tensor, and the bytes of all."""
    slots, offset = [], 0
    for name, weight in weights.items():
        dtype = str(weight.dtype).removeprefix("torch.")  # numpy names its types alike
        slots.append({"name": name, "dtype": dtype, "shape": list(weight.shape), "offset": offset})
        offset += _aligned(weight.nbytes)
    return slots, offset


def _write(segment: SharedMemory, slot: Mapping[str, Any], weight: Weight) -> None:
    if isinstance(weight, Tensor):
        _view(segment, slot).copy_(weight.detach())
    else:  # not through torch, which warns about the read-only arrays that Ray hands out
        np.copyto(np.ndarray(weight.shape, weight.dtype, segment.buf, slot["offset"]), weight)


def _view(segment: SharedMemory, slot: Mapping[str, Any]) -> Tensor:
    """The slot's tensor over the segment's memory; must be dropped before the segment is closed."""
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
            f"{free / 2**20:.0f} MiB free; enlarge it (docker run --shm-size=...)"
        )
