"""The critic in plain torch: the policy's decoder with a value head. It has its own weights and its own optimizer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl.algorithm.losses import explained_variance, value_loss
from rl.learner.batch import Batch, Group, minibatches
from rl.learner.distributed import Ranks
from rl.learner.optimizer import Optimizer
from rl.learner.options import LearnerOptions
from rl.learner.packing import PackedRow
from rl.learner.sharded import Sharded
from rl.learner.targets import Targets
from rl.model.hf_folder import VALUE_HEAD
from rl.model.packed import hidden_states
from rl.model.weight_files import save_tensors


class ValueModel(nn.Module):
    """A decoder trunk and a linear value head without bias. Parameters have the same names as the tensors on disk."""

    def __init__(self, trunk: Any, hidden: int) -> None:
        super().__init__()
        self.model = trunk
        self.value_head = nn.Linear(hidden, 1, bias=False, device=trunk.device)

    def forward(self, row: PackedRow, features: Mapping[str, Tensor]) -> Tensor:
        """Returns the value of the state after every token of a packed row, [T] float32."""
        return self.value_head(hidden_states(self.model, row, features))[:, 0].float()


def initial_head(hidden: int, seed: int) -> Tensor:
    """Returns small random weights [1, hidden], so that the critic's values are near 0 at the start.

    The weights have a normal distribution with mean 0 and standard deviation 1 / (hidden + 1), as in the code of
    Open-Reasoner-Zero.
    """
    return torch.randn((1, hidden), generator=torch.Generator().manual_seed(seed)) / (hidden + 1)


@dataclass(frozen=True)
class _LastGraph:
    """The autograd graph of the last packed row. `Critic.values` computes the graph, and `Critic.update` uses it
    again."""

    groups: tuple[Group, ...]  # all groups of the batch
    rows: Sequence[PackedRow]  # this rank's packed rows of the whole batch
    values: Tensor  # [T], values of the last packed row, with the graph for the backward pass


class Critic(Sharded):
    """Computes the values for the advantages, and updates the critic's weights.

    A critic is a plain object. Ray creates one such object in the process of each rank.

    Args:
        folder: model folder. The critic starts from this model's decoder, or from the weights in `options.model.critic`
            if this option is set.
    """

    def __init__(self, folder: str, options: LearnerOptions, ranks: Ranks | None = None) -> None:
        super().__init__(folder, options, ranks)
        head = self.model.value_head
        weight = self.ranks.local_shard(initial_head(head.in_features, options.seed), head.weight)
        self.model.load_state_dict({VALUE_HEAD: weight}, strict=False, assign=True)
        self._last_graph: _LastGraph | None = None
        trained, ppo = dict(self.model.named_parameters()), options.ppo
        self.optimizer = Optimizer(trained, ppo, lr=ppo.critic_lr, warmup=ppo.critic_warmup)
        if options.model.critic is not None:
            self.read_model(options.model.critic)

    def prepare(self, base: Any) -> None:
        """Replaces the language head with a value head, and splits the parameters over the ranks."""
        self.model = ValueModel(base.model, getattr(base.config, "text_config", base.config).hidden_size)
        self.ranks.shard(self.model, base.model.layers, self.dtype)

    def _forward(self, row: PackedRow, features: Mapping[str, Tensor]) -> Tensor:
        with self.ranks.autocast(self.dtype):
            return self.model(row, features)

    def values(self, batch: Batch, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns two tensors: the value before each response token [N, R] (0 outside the mask), and the value after
        the last response token [N].

        If the update is a single step over the whole batch, the graph of the last packed row is kept, and the update
        uses it again. This is correct because the weights do not change before the update. The kept graph takes no
        additional memory, because the update would compute the same graph.
        """
        values = torch.zeros(batch.response_mask.shape)
        final = torch.zeros(len(values))
        rows, self._last_graph = self.rows(batch.groups), None
        for row in rows:
            keep = row is rows[-1] and self.options.ppo.critic_minibatches == 1
            with torch.set_grad_enabled(keep):
                token_values = self._forward(row, features)
            if keep:
                self._last_graph = _LastGraph(batch.groups, rows, token_values)
            token_values = token_values.detach().cpu()
            if row.counts:
                row.write_to(values, row.padded(token_values[row.before]))
                final[row.batch_rows] = token_values[row.last]
        return self.ranks.sum(values), self.ranks.sum(final)

    def update(
        self, batch: Batch, targets: Targets, features: Mapping[str, Tensor], iteration: int
    ) -> dict[str, float]:
        """Makes one pass over the batch in `ppo.critic_minibatches` optimizer steps.

        Returns: the metrics value/*.
        Raises: FloatingPointError if the gradient was not finite in too many steps in a row.
        """
        seed = f"{self.options.seed}-critic-{iteration}"
        total, norm, trained, skipped = torch.zeros(()), 0.0, 0, 0
        device = self.ranks.device
        for groups in minibatches(batch.groups, self.options.ppo.critic_minibatches, seed):
            tokens = sum(len(response) for group in groups for response in group.responses)
            minibatch_total = torch.zeros(())
            for row, known_values in self._rows_to_learn(groups, batch):
                token_values = self._forward(row, features) if known_values is None else known_values
                values = row.padded(token_values[row.before.to(device)])
                mask, returns = (row.read_from(full).to(device) for full in (batch.response_mask, targets.returns))
                loss = value_loss(values, returns, mask, tokens=tokens)
                # FSDP averages gradients over the ranks, but we need their sum. So the loss is multiplied by the number
                # of ranks.
                (loss * (row.counts * self.ranks.count)).backward()
                minibatch_total += loss.detach().cpu() * (row.counts * tokens)
            if (step_norm := self.optimizer.step()) is None:
                skipped += 1
                continue
            norm, trained = max(norm, step_norm), trained + tokens
            total += minibatch_total
        metrics = {"value/grad_norm": norm, "value/skipped_steps": float(skipped)}
        if trained:
            metrics["value/loss"] = float(self.ranks.sum(total)) / trained
        explained = explained_variance(targets.values, targets.returns, batch.response_mask)
        return metrics if math.isnan(explained) else metrics | {"value/explained_variance": explained}

    def _rows_to_learn(self, groups: Sequence[Group], batch: Batch) -> Iterator[tuple[PackedRow, Tensor | None]]:
        """Yields (packed row, values) for each packed row of a minibatch. The values are None if they must still be
        computed.

        If the method `values` kept the graph of a packed row, this packed row comes first, with its values.
        """
        last, self._last_graph = self._last_graph, None
        # All ranks get the same calls, so this condition has the same result on all ranks.
        if last is None or last.groups != batch.groups:
            yield from ((row, None) for row in self.rows(groups))
            return
        *other_rows, last_row = last.rows
        yield last_row, last.values
        yield from ((row, None) for row in other_rows)

    def full_state(self) -> dict[str, Tensor]:
        """Returns the weights of trunk and value head in float32, on rank 0. Collective: every rank must call it."""
        return self.ranks.gather(self.model.state_dict(), copy=True)

    def write_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Writes only the weights, because a critic has no config and no tokenizer of its own."""
        save_tensors(tensors, folder)
