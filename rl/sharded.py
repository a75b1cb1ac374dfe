"""What policy and critic have in common: a decoder that several processes may hold together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rl.config import Config
from rl.model import checkpoint
from rl.model.packed import pairs_per_token, recompute_layers
from rl.optimizer import Optimizer
from rl.packing import Group, Row, rows_of_rank
from rl.ranks import Ranks


class Sharded:
    """Every rank gets the same calls with the same arguments, works on its share, and has the whole answer.

    Args:
        folder: model folder to start from.
    """

    def __init__(self, folder: str, config: Config, ranks: Ranks | None = None) -> None:
        self.source, self.config, self.ranks = Path(folder), config, ranks or Ranks()
        base = checkpoint.load(self.source, device=self.ranks.device, prepare=self.prepare, own=self.ranks.own)
        self.image_token_id, self._decoder = base.image_token_id, base.model
        if config.learner.activation_checkpointing:
            recompute_layers(base.model)

    @classmethod
    def of_rank(cls, folder: str, config: Config, device: str, rank: int, count: int, address: str | None) -> Self:
        """One of `count`, in the process that calls this; they meet at `address`."""
        return cls(folder, config, Ranks(device, rank, count, address, config.learner.threads))

    def prepare(self, base: Any) -> None:
        """Told of the model before its weights take memory: to choose what is kept, and split it over the ranks."""
        raise NotImplementedError

    def adamw(self, trained: Mapping[str, nn.Parameter], lr: float, warmup: int) -> Optimizer:
        """The recipe's optimizer of some parameters."""
        ppo = self.config.ppo
        return Optimizer(
            trained,
            lr=lr,
            warmup=warmup,
            betas=ppo.betas,
            weight_decay=ppo.weight_decay,
            max_grad_norm=ppo.max_grad_norm,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What engine and learner compute in; the learner's own weights are float32."""
        return getattr(torch, self.config.model.dtype)

    def rows(self, groups: Sequence[Group]) -> list[Row]:
        """This rank's packed rows of some groups; every rank has as many."""
        return rows_of_rank(
            groups,
            self.config.learner.token_budget,
            self.image_token_id,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            pairs_per_token=pairs_per_token(self._decoder.config),
        )
