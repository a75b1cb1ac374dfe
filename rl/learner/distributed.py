"""The processes (ranks) that hold one model together: FSDP2 over a process group. Nothing else in this room depends on
the kind of device."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # tensors on the CPU are always summed over gloo
TIMEOUT = timedelta(hours=1)  # the longest wait for another rank; a rank that has died is noticed at once


class Ranks:
    """This process as one of the ranks that hold a model together.

    Args:
        device: cpu or cuda.
        rank, count: 0 <= rank < count. A single rank has no process group and holds plain tensors.
        address: host:port on which rank 0 listens, if there are several ranks.
        threads: CPU threads of this process; None: torch's default.
    """

    def __init__(
        self, device: str = "cpu", rank: int = 0, count: int = 1, address: str | None = None, threads: int | None = None
    ) -> None:
        self.device, self.rank, self.count = device, rank, count
        self.mesh: DeviceMesh | None = None
        self.checkpoint_group: dist.ProcessGroup | None = None  # for a thread that writes while others compute
        if threads:
            torch.set_num_threads(threads)
        if count > 1:
            dist.init_process_group(
                BACKENDS[device], init_method=f"tcp://{address}", rank=rank, world_size=count, timeout=TIMEOUT
            )
            self.mesh = init_device_mesh(device, (count,))
            group: Any = dist.new_group(backend="gloo")  # its type also covers processes outside of the group
            self.checkpoint_group = group

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes the model folders."""
        return self.rank == 0

    def shard(self, model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Splits the parameters of `model`, its `layers` one by one, over the ranks. A single rank keeps all.

        If `dtype` is smaller than float32, the weights are gathered and computed with in it; gradients are summed in
        float32.
        """
        if self.mesh is None:
            return
        low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": self.mesh} | ({} if dtype == torch.float32 else {"mp_policy": low})
        for layer in layers:
            fully_shard(layer, **options)
        # Reshard after the root's forward pass too: a pass without gradient would otherwise leave gathered weights
        # behind, which the next optimizer step makes stale.
        fully_shard(model, reshard_after_forward=True, **options)

    def autocast(self, dtype: torch.dtype) -> Any:
        """Returns the context in which a forward pass computes in `dtype` from float32 weights."""
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def local_shard(self, full: Tensor, like: Tensor) -> Tensor:
        """Returns this rank's shard of a tensor that every rank has in full, split and placed as `like` is."""
        if not isinstance(like, DTensor):
            return full.to(self.device)
        # src_data_rank=None: every rank cuts its own copy, nothing is sent
        return distribute_tensor(full.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Returns the full tensor of this rank's shard. Collective: call on every rank."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gather(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, copy: bool = False
    ) -> dict[str, Tensor]:
        """Returns full tensors in host memory on rank 0, and {} on the others. Collective: call on every rank.

        Args:
            copy: whether the results must not share memory with `tensors`, so that later changes do not reach them.
        """
        result = {}
        for name, tensor in tensors.items():
            full = self.full_tensor(tensor.detach())
            if self.is_first:
                fresh = isinstance(tensor, DTensor)
                full = full.to("cpu", dtype or full.dtype, copy=copy and not fresh).contiguous()
                # Shards of uneven sizes are gathered into a longer tensor; a file cannot store a part of a tensor.
                result[name] = full if full.untyped_storage().nbytes() == full.nbytes else full.clone()
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a CPU tensor over the ranks, in place. Collective: call on every rank."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_named(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns numbers by name, summed over the ranks. All ranks must have the same names. Collective: call on
        every rank."""
        names = sorted(numbers)
        if self.count == 1 or not names:
            return dict(numbers)
        sums = self.sum(torch.stack([numbers[name].detach().double().cpu() for name in names]))
        return dict(zip(names, sums.unbind(), strict=True))
