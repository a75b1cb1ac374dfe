"""The processes that share one model: FSDP2 over a process group, and everything that differs between devices."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # sums of host tensors go over gloo everywhere
TIMEOUT = timedelta(hours=1)  # the longest a rank may wait for another one; a dead one is noticed at once


class Ranks:
    """One process's place among those that hold a model together.

    Args:
        device: cpu or cuda.
        rank, count: 0 <= rank < count. One alone needs no process group and holds plain tensors.
        address: host:port where rank 0 listens, if there are several.
        threads: CPU threads of this process; None leaves it to torch.
    """

    def __init__(
        self, device: str = "cpu", rank: int = 0, count: int = 1, address: str | None = None, threads: int | None = None
    ) -> None:
        self.device, self.rank, self.count = device, rank, count
        self.mesh: DeviceMesh | None = None
        self.files: dist.ProcessGroup | None = None  # for a thread that writes while others compute
        if threads:
            torch.set_num_threads(threads)
        if count > 1:
            dist.init_process_group(
                BACKENDS[device], init_method=f"tcp://{address}", rank=rank, world_size=count, timeout=TIMEOUT
            )
            self.mesh = init_device_mesh(device, (count,))
            files: Any = dist.new_group(backend="gloo")  # whose type allows for processes outside of the group
            self.files = files

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and answers."""
        return self.rank == 0

    def shard(self, model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Split the parameters of `model`, its `layers` one by one, over the ranks. Nothing to do for one rank.

        Computation in a `dtype` below float32 gathers the weights in it; gradients are added up in float32.
        """
        if self.mesh is None:
            return
        low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": self.mesh} | ({} if dtype == torch.float32 else {"mp_policy": low})
        for layer in layers:
            fully_shard(layer, **options)
        # Also after the forward pass of the root, or a pass without gradient would leave weights behind that the
        # next optimizer step makes stale.
        fully_shard(model, reshard_after_forward=True, **options)

    def autocast(self, dtype: torch.dtype) -> Any:
        """The context in which a forward pass computes in `dtype` from float32 weights."""
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def own(self, full: Tensor, like: Tensor) -> Tensor:
        """This rank's share of a tensor that all ranks have, cut and placed as `like` is."""
        if not isinstance(like, DTensor):
            return full.to(self.device)
        # src_data_rank=None: every rank cuts its own copy, nothing is sent
        return distribute_tensor(full.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which each rank has a share; every rank has to ask."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gathered(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, copy: bool = False
    ) -> dict[str, Tensor]:
        """Whole tensors in host memory on the first rank, nothing on others; every rank has to ask.

        Args:
            copy: whether they must stay as they are now, whatever becomes of the given ones.
        """
        result = {}
        for name, tensor in tensors.items():
            full = self.whole(tensor.detach())
            if self.first:
                fresh = isinstance(tensor, DTensor)
                full = full.to("cpu", dtype or full.dtype, copy=copy and not fresh).contiguous()
                # Uneven shares are gathered into a longer tensor, which a file cannot hold a part of.
                result[name] = full if full.untyped_storage().nbytes() == full.nbytes else full.clone()
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, on the CPU; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def totals(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers by name, added up over the ranks, which must all have the same names."""
        names = sorted(sums)
        if self.count == 1 or not names:
            return dict(sums)
        added = self.sum(torch.stack([sums[name].detach().double().cpu() for name in names]))
        return dict(zip(names, added.unbind(), strict=True))
