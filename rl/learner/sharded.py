"""What policy and critic have in common: a decoder that several processes may hold together."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, async_save, load

from rl.learner.distributed import Ranks
from rl.learner.optimizer import Optimizer
from rl.learner.options import LearnerOptions
from rl.learner.packing import Group, PackedRow, rows_of_rank
from rl.model import hf_folder
from rl.model.packed import pairs_per_token, recompute_layers


class Sharded:
    """Every rank gets the same calls with the same arguments, works on its share, and has the whole answer.

    Args:
        folder: model folder to start from.
    """

    def __init__(self, folder: str, options: LearnerOptions, ranks: Ranks | None = None) -> None:
        self.source, self.options, self.ranks = Path(folder), options, ranks or Ranks()
        base = hf_folder.load(
            self.source,
            device=self.ranks.device,
            prepare=self.prepare,
            own=self.ranks.own,
            yarn=options.yarn,
        )
        self.image_token_id, self._decoder = base.image_token_id, base.model
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[Any] = []
        if options.activation_checkpointing:
            recompute_layers(base.model)

    @classmethod
    def of_rank(
        cls, folder: str, options: LearnerOptions, device: str, rank: int, count: int, address: str | None
    ) -> Self:
        """One of `count`, in the process that calls this; they meet at `address`."""
        return cls(folder, options, Ranks(device, rank, count, address, options.threads))

    optimizer: Optimizer

    def prepare(self, base: Any) -> None:
        """Told of the model before its weights take memory: to choose what is kept, and split it over the ranks."""
        raise NotImplementedError

    def adamw(self, trained: Mapping[str, nn.Parameter], lr: float, warmup: int) -> Optimizer:
        """The recipe's optimizer of some parameters."""
        ppo = self.options.ppo
        return Optimizer(
            trained,
            lr=lr,
            warmup=warmup,
            betas=ppo.betas,
            weight_decay=ppo.weight_decay,
            max_grad_norm=ppo.max_grad_norm,
            max_skipped=ppo.max_skipped_steps,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What engine and learner compute in; the learner's own weights are float32."""
        return getattr(torch, self.options.dtype)

    def whole(self) -> dict[str, Tensor]:
        """Copies of the weights that a checkpoint has, by their names on disk, on the first rank."""
        raise NotImplementedError

    def write_whole(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write what `whole` gave, in Hugging Face layout."""
        raise NotImplementedError

    def read_whole(self, folder: Path) -> None:
        """Take over what `write_whole` wrote. Raises CheckpointError naming what is missing."""
        missing = dict(self.optimizer.parameters)
        with torch.no_grad():
            for name, tensor in hf_folder.tensors(folder):
                if (parameter := missing.pop(name, None)) is not None:
                    parameter.copy_(self.ranks.own(tensor, parameter))
        if missing:
            raise hf_folder.CheckpointError(f"{folder} lacks {', '.join(sorted(missing)[:8])}")

    def shards(self) -> dict[str, Tensor]:
        """The training state that is kept beside them: tensors, or this rank's parts of them."""
        return self.optimizer.state()

    def save(self, model: Path, state: Path) -> int:
        """Copy weights and training state now, and write them in the background; `written` tells when it is done.

        Args:
            model: folder for the weights, written by the first rank.
            state: folder for the training state, of which every rank writes its part.
        Returns: optimizer steps, which `restore` has to be told.
        """
        tensors = self.whole()
        if self.ranks.first:
            self._writing.append(self._writer.submit(self.write_whole, tensors, model))
        if shards := self.shards():
            writer = HuggingFaceStorageWriter(str(state), save_distributed=True)
            saved: Any = async_save(shards, storage_writer=writer, process_group=self.ranks.files)
            self._writing.append(saved)
        return self.optimizer.steps

    def written(self) -> bool:
        """Whether all that was saved is on disk. Raises what went wrong in writing it."""
        if not all(one.done() for one in self._writing):
            return False
        writing, self._writing = self._writing, []
        for one in writing:
            one.result()
        return True

    def restore(self, model: Path, state: Path, steps: int) -> None:
        """Continue after `steps` optimizer steps from what `save` wrote, with any number of ranks."""
        self.read_whole(model)
        self.optimizer.continue_after(steps)
        if shards := self.shards():
            load(shards, storage_reader=HuggingFaceStorageReader(str(state)))

    def rows(self, groups: Sequence[Group]) -> list[PackedRow]:
        """This rank's packed rows of some groups; every rank has as many."""
        return rows_of_rank(
            groups,
            self.options.token_budget,
            self.image_token_id,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            pairs_per_token=pairs_per_token(self._decoder.config),
        )
