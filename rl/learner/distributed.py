"""Splits one model over several processes (ranks) with FSDP2. Only this file of rl/learner depends on the kind of
device."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # tensors on the CPU are always summed with gloo
TIMEOUT = timedelta(hours=1)  # maximum wait for another rank; if a rank dies, the others notice it at once


class Ranks:
    """Connects this process (one rank) with the other ranks, which hold other parts of the same model.

    Args:
        device: cpu or cuda.
        rank: the number of this rank, 0 <= rank < count.
        count: the number of ranks. A single rank has no process group and holds plain tensors.
        address: host:port on which rank 0 listens, if there are several ranks.
        threads: the number of CPU threads of this process. None uses torch's default.
    """

    def __init__(
        self, device: str = "cpu", rank: int = 0, count: int = 1, address: str | None = None, threads: int | None = None
    ) -> None:
        self.device, self.rank, self.count = device, rank, count
        self.mesh: DeviceMesh | None = None
        self.checkpoint_group: dist.ProcessGroup | None = None  # used by the thread that writes checkpoints
        if threads:
            torch.set_num_threads(threads)
        if device == "cpu":
            # By default, torch's CPU threads add the gradients of an indexed tensor in an order that varies from run to
            # run. The last digits of the gradients would then vary too.
            torch.use_deterministic_algorithms(True)
            options: Any = torch.utils.deterministic
            options.fill_uninitialized_memory = False  # filling new tensors would only take time
        if count > 1:
            dist.init_process_group(
                BACKENDS[device], init_method=f"tcp://{address}", rank=rank, world_size=count, timeout=TIMEOUT
            )
            self.mesh = init_device_mesh(device, (count,))
            # The type is Any, because in torch's annotation the result of new_group may be something else than a group.
            group: Any = dist.new_group(backend="gloo")
            self.checkpoint_group = group

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes the model folders."""
        return self.rank == 0

    def shard(self, model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Splits the parameters of `model` over the ranks, one layer of `layers` at a time. A single rank keeps all
        parameters.

        If `dtype` is smaller than float32, weights are gathered in `dtype` and the model computes in `dtype`. Gradients
        are summed in float32.
        """
        if self.mesh is None:
            return
        low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": self.mesh} | ({} if dtype == torch.float32 else {"mp_policy": low})
        for layer in layers:
            fully_shard(layer, **options)
        # The weights outside of `layers` are split again after each forward pass. Otherwise, after a pass without
        # gradient, they would stay gathered, and the next optimizer step would not update the gathered copy.
        fully_shard(model, reshard_after_forward=True, **options)

    def autocast(self, dtype: torch.dtype) -> Any:
        """Returns a context manager in which a forward pass with float32 weights computes in `dtype`."""
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def local_shard(self, full: Tensor, like: Tensor) -> Tensor:
        """Returns this rank's shard of `full`. Every rank must pass the whole tensor `full`. `full` is split in the
        same way as `like`."""
        if not isinstance(like, DTensor):
            return full.to(self.device)
        # With src_data_rank=None every rank cuts its shard from its own `full`, and the ranks send no data.
        return distribute_tensor(full.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Gathers the shards of all ranks and returns the full tensor. Collective: every rank must call it."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gather(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, copy: bool = False
    ) -> dict[str, Tensor]:
        """Returns the full tensors on rank 0, in CPU memory, and {} on the other ranks. Collective: every rank must
        call it.

        Args:
            copy: if True, the results share no memory with `tensors`, so later changes of `tensors` do not change the
                results.
        """
        result = {}
        for name, tensor in tensors.items():
            full = self.full_tensor(tensor.detach())
            if self.is_first:
                fresh = isinstance(tensor, DTensor)
                full = full.to("cpu", dtype or full.dtype, copy=copy and not fresh).contiguous()
                # If the shards differ in size, they are gathered into a longer tensor, and `full` is only a part of it.
                # A file can only store a whole tensor, so `full` is copied.
                result[name] = full if full.untyped_storage().nbytes() == full.nbytes else full.clone()
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a CPU tensor over the ranks, in place. Collective: every rank must call it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_named(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns each named number, summed over all ranks. All ranks must pass the same names. Collective: every rank
        must call it."""
        names = sorted(numbers)
        if self.count == 1 or not names:
            return dict(numbers)
        sums = self.sum(torch.stack([numbers[name].detach().double().cpu() for name in names]))
        return dict(zip(names, sums.unbind(), strict=True))
