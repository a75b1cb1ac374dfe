"""The critic in plain torch: the policy's decoder with a value head, its own weights and optimizer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from rl.algorithm.losses import explained_variance, value_loss
from rl.learner.distributed import Ranks
from rl.learner.options import LearnerOptions
from rl.learner.packing import Batch, Group, Pack, PackedRow, minibatches
from rl.learner.sharded import Sharded
from rl.learner.targets import Targets
from rl.model.hf_folder import VALUE_HEAD
from rl.model.packed import hidden_states


class ValueModel(nn.Module):
    """A decoder trunk and a linear value head without bias; tensor names as on disk."""

    def __init__(self, trunk: Any, hidden: int) -> None:
        super().__init__()
        self.model = trunk
        self.value_head = nn.Linear(hidden, 1, bias=False, device=trunk.device)

    def forward(self, row: Pack, features: Mapping[str, Tensor]) -> Tensor:
        """The value of the state after every token of a packed row, [T] float32."""
        return self.value_head(hidden_states(self.model, row, features))[:, 0].float()


def initial_head(hidden: int, seed: int) -> Tensor:
    """[1, hidden] small normal weights, std 1 / (hidden + 1), so that values start near 0 (Open-Reasoner-Zero's
    code)."""
    return torch.randn((1, hidden), generator=torch.Generator().manual_seed(seed)) / (hidden + 1)


@dataclass(frozen=True)
class _Kept:
    """What an update may start with."""

    groups: tuple[Group, ...]  # of the batch
    rows: Sequence[PackedRow]  # all of them, packed
    values: Tensor  # of the last of the rows, [T], with their graph


class Critic(Sharded):
    """Values for advantages, and the value update. A plain object; Ray places it, possibly split over several ranks.

    Args:
        folder: model folder whose decoder the critic starts from, unless `options.critic` names another one.
    """

    def __init__(self, folder: str, options: LearnerOptions, ranks: Ranks | None = None) -> None:
        super().__init__(folder, options, ranks)
        head = self.model.value_head
        weight = self.ranks.own(initial_head(head.in_features, options.seed), head.weight)
        self.model.load_state_dict({VALUE_HEAD: weight}, strict=False, assign=True)
        self._kept: _Kept | None = None
        trained = dict(self.model.named_parameters())
        self.optimizer = self.adamw(trained, options.ppo.critic_lr, options.ppo.critic_warmup)
        if options.critic is not None:
            self.read_whole(options.critic)

    def prepare(self, base: Any) -> None:
        """Exchange the head, which takes no memory yet, and split the parameters over the ranks."""
        self.model = ValueModel(base.model, getattr(base.config, "text_config", base.config).hidden_size)
        self.ranks.shard(self.model, base.model.layers, self.dtype)

    def _forward(self, row: PackedRow, features: Mapping[str, Tensor]) -> Tensor:
        with self.ranks.autocast(self.dtype):
            return self.model(row.pack, features)

    def values(self, batch: Batch, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Values before each response token [N, R] (0 outside the mask) and after the last one [N].

        If the update will go over the whole batch at once, the last packed row's graph is kept for it: no weights
        change in between, and an update needs as much memory anyway.
        """
        values = torch.zeros(batch.response_mask.shape)
        final = torch.zeros(len(values))
        rows, self._kept = self.rows(batch.groups), None
        for row in rows:
            keep = row is rows[-1] and self.options.ppo.critic_minibatches == 1
            with torch.set_grad_enabled(keep):
                every = self._forward(row, features)
            if keep:
                self._kept = _Kept(batch.groups, rows, every)
            every = every.detach().cpu()
            if row.counts:
                row.pack.put(values, row.pack.padded(every[row.pack.before]))
                final[row.pack.rows] = every[row.pack.last]
        return self.ranks.sum(values), self.ranks.sum(final)

    def update(
        self, batch: Batch, targets: Targets, features: Mapping[str, Tensor], iteration: int
    ) -> dict[str, float]:
        """One pass over the batch in `ppo.critic_minibatches` optimizer steps. Returns value/* metrics.

        Raises: FloatingPointError if gradients were not finite too often in a row.
        """
        seed = f"{self.options.seed}-critic-{iteration}"
        total, norm, trained, skipped = torch.zeros(()), 0.0, 0, 0
        device = self.ranks.device
        for groups in minibatches(batch.groups, self.options.ppo.critic_minibatches, seed):
            tokens = sum(len(response) for group in groups for response in group.responses)
            found = torch.zeros(())
            for row, known in self._rows_to_learn(groups, batch):
                pack = row.pack
                every = self._forward(row, features) if known is None else known
                values = pack.padded(every[pack.before.to(device)])
                mask, returns = (pack.part(full).to(device) for full in (batch.response_mask, targets.returns))
                loss = value_loss(values, returns, mask, tokens=tokens)
                # FSDP averages gradients over the ranks; the loss is a sum over all of them.
                (loss * (row.counts * self.ranks.count)).backward()
                found += loss.detach().cpu() * (row.counts * tokens)
            if (step := self.optimizer.step()) is None:
                skipped += 1
                continue
            norm, trained = max(norm, step), trained + tokens
            total += found
        metrics = {"value/grad_norm": norm, "value/skipped_steps": float(skipped)}
        if trained:
            metrics["value/loss"] = float(self.ranks.sum(total)) / trained
        explained = explained_variance(targets.values, targets.returns, batch.response_mask)
        return metrics if math.isnan(explained) else metrics | {"value/explained_variance": explained}

    def _rows_to_learn(self, groups: Sequence[Group], batch: Batch) -> Iterator[tuple[PackedRow, Tensor | None]]:
        """The packed rows of a minibatch, each with its values if `values` has kept them."""
        kept, self._kept = self._kept, None
        # All ranks are asked the same, so that they decide alike.
        if kept is None or kept.groups != batch.groups:
            yield from ((row, None) for row in self.rows(groups))
            return
        *others, last = kept.rows
        yield last, kept.values
        yield from ((row, None) for row in others)

    def whole(self) -> dict[str, Tensor]:
        """Trunk and value head in float32."""
        return self.ranks.gathered(self.model.state_dict(), copy=True)

    def write_whole(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(dict(tensors), folder, max_shard_size="4GB")
