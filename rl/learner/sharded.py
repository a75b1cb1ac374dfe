"""Defines the base class of policy and critic. The class has a decoder, which may be split over several ranks, and it
reads and writes checkpoints."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, async_save, load

from rl.learner.batch import Group
from rl.learner.distributed import Ranks
from rl.learner.optimizer import Optimizer
from rl.learner.options import LearnerOptions
from rl.learner.packing import PackedRow, rows_of_rank
from rl.model import hf_folder
from rl.model.packed import pairs_per_token, recompute_layers
from rl.model.weight_files import read_tensors


class Sharded:
    """The base class of policy and critic. All ranks get the same calls with the same arguments. Each rank computes
    only its share of the work, but returns the whole result.

    Args:
        folder: model folder to start from.
    """

    def __init__(self, folder: str, options: LearnerOptions, ranks: Ranks | None = None) -> None:
        self.source, self.options, self.ranks = Path(folder), options, ranks or Ranks()
        base = hf_folder.load(
            self.source,
            device=self.ranks.device,
            prepare=self.prepare,
            local_shard=self.ranks.local_shard,
            yarn=options.model.yarn,
        )
        self.image_token_id, self._decoder = base.image_token_id, base.model
        self.positions = partial(type(base).positions, base.config)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[Any] = []
        if options.learner.activation_checkpointing:
            recompute_layers(base.model)

    @classmethod
    def of_rank(
        cls, folder: str, options: LearnerOptions, device: str, rank: int, count: int, address: str | None
    ) -> Self:
        """Returns this process's part of a model that is split over several ranks. `count` is the number of ranks. The
        ranks connect at `address`."""
        return cls(folder, options, Ranks(device, rank, count, address, options.learner.threads))

    optimizer: Optimizer

    def prepare(self, base: Any) -> None:
        """Selects the parts of `base` to train and splits them over the ranks. When this method is called, the weights
        of `base` take no memory yet."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which engine and learner compute. The learner keeps its weights in float32."""
        return getattr(torch, self.options.model.dtype)

    def full_state(self) -> dict[str, Tensor]:
        """Returns copies of the weights for a checkpoint, keyed by their names on disk. Only rank 0 gets the copies.
        Collective: every rank must call it."""
        raise NotImplementedError

    def write_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Writes the result of `full_state` as a Hugging Face folder."""
        raise NotImplementedError

    def read_model(self, folder: Path) -> None:
        """Loads the weights that `write_model` wrote. Raises CheckpointError if tensors are missing. The message names
        these tensors."""
        missing = dict(self.optimizer.parameters)
        with torch.no_grad():
            for name, tensor in read_tensors(folder):
                if (parameter := missing.pop(name, None)) is not None:
                    parameter.copy_(self.ranks.local_shard(tensor, parameter))
        if missing:
            raise hf_folder.CheckpointError(f"{folder} lacks the tensors {', '.join(sorted(missing)[:8])}")

    def training_state(self) -> dict[str, Tensor]:
        """Returns the tensors (or this rank's shards of these tensors) that a checkpoint stores in addition to the
        model folder."""
        return self.optimizer.state()

    def save(self, model: Path, state: Path) -> int:
        """Copies weights and training state, and writes the copies in the background. `written` returns True when the
        copies are on disk.

        Args:
            model: folder into which rank 0 writes the weights.
            state: folder into which every rank writes its own shards of the training state.
        Returns: the number of optimizer steps made, which `restore` needs.
        """
        tensors = self.full_state()
        if self.ranks.is_first:
            self._writing.append(self._writer.submit(self.write_model, tensors, model))
        if shards := self.training_state():
            writer = HuggingFaceStorageWriter(str(state), save_distributed=True)
            saving: Any = async_save(shards, storage_writer=writer, process_group=self.ranks.checkpoint_group)
            self._writing.append(saving)
        return self.optimizer.steps

    def written(self) -> bool:
        """True if everything that `save` writes in the background is on disk. If writing failed, raises the
        exception."""
        if not all(write.done() for write in self._writing):
            return False
        writing, self._writing = self._writing, []
        for write in writing:
            write.result()
        return True

    def restore(self, model: Path, state: Path, steps: int) -> None:
        """Loads the state that `save` wrote after `steps` optimizer steps. The number of ranks may have changed since
        then."""
        self.read_model(model)
        self.optimizer.continue_after(steps)
        if shards := self.training_state():
            load(shards, storage_reader=HuggingFaceStorageReader(str(state)))

    def rows(self, groups: Sequence[Group]) -> list[PackedRow]:
        """Returns this rank's share of the packed rows of `groups`. All ranks get the same number of packed rows."""
        return rows_of_rank(
            groups,
            self.options.learner.token_budget,
            self.image_token_id,
            self.positions,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            pairs_per_token=pairs_per_token(self._decoder.config),
        )
