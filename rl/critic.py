"""The critic in plain torch: the policy's decoder with a value head, its own weights and optimizer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rl.config import Config
from rl.losses import explained_variance, value_loss
from rl.model import checkpoint
from rl.model.packed import hidden_states
from rl.optimizer import Optimizer
from rl.packing import Batch, Group, Pack, minibatches, pack
from rl.targets import Targets

WEIGHTS = "model.safetensors"
OPTIMIZER = "critic_optimizer.safetensors"


class ValueModel(nn.Module):
    """A decoder trunk and a linear value head without bias; tensor names as on disk."""

    def __init__(self, trunk: Any, hidden: int) -> None:
        super().__init__()
        self.model = trunk
        self.value_head = nn.Linear(hidden, 1, bias=False)

    def initialize_head(self, seed: int) -> None:
        """Small normal weights, std 1 / (hidden + 1), so that values start near 0 (Open-Reasoner-Zero's code)."""
        generator = torch.Generator().manual_seed(seed)
        weight = self.value_head.weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1))

    def forward(self, row: Pack, features: Mapping[str, Tensor]) -> Tensor:
        """The value of the state after every token of a packed row, [T] float32."""
        return self.value_head(hidden_states(self.model, row, features))[:, 0].float()


class Critic:
    """Values for advantages, and the value update. A plain object; Ray places it.

    Args:
        folder: model folder whose decoder the critic starts from.
    """

    def __init__(self, folder: str, config: Config, device: str = "cpu") -> None:
        if config.learner.threads:
            torch.set_num_threads(config.learner.threads)
        self.config, self.device = config, device
        base = checkpoint.load(folder, device=device)
        self.image_token_id = base.image_token_id
        text = getattr(base.config, "text_config", base.config)
        self.model = ValueModel(base.model, text.hidden_size).to(device)
        self.model.initialize_head(config.seed)
        self.optimizer = Optimizer(
            dict(self.model.named_parameters()),
            lr=config.ppo.critic_lr,
            warmup=config.ppo.critic_warmup,
            betas=config.ppo.betas,
            weight_decay=config.ppo.weight_decay,
            max_grad_norm=config.ppo.max_grad_norm,
        )

    def _packs(self, groups: Sequence[Group]) -> list[Pack]:
        return pack(groups, self.config.learner.token_budget, self.image_token_id)

    def _forward(self, row: Pack, features: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16"):
            return self.model(row, features)

    @torch.no_grad()
    def values(self, batch: Batch, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Values before each response token [N, R] (0 outside the mask) and after the last one [N]."""
        values = torch.zeros(batch.response_mask.shape)
        final = torch.zeros(len(values))
        for row in self._packs(batch.groups):
            every = self._forward(row, features).cpu()
            values[row.rows[row.row], row.column] = every[row.before]
            final[row.rows] = every[row.last]
        return values, final

    def update(
        self, batch: Batch, targets: Targets, features: Mapping[str, Tensor], iteration: int
    ) -> dict[str, float]:
        """One pass over the batch in `ppo.critic_minibatches` optimizer steps. Returns value/* metrics."""
        seed = f"{self.config.seed}-critic-{iteration}"
        total, norm = 0.0, 0.0
        parts = minibatches(batch.groups, self.config.ppo.critic_minibatches, seed)
        for groups in parts:
            packs = self._packs(groups)
            tokens = sum(len(row.targets) for row in packs)
            for row in packs:
                values = row.padded(self._forward(row, features)[row.before.to(self.device)])
                mask = row.part(batch.response_mask).to(self.device)
                returns = row.part(targets.returns).to(self.device)
                loss = value_loss(values, returns, mask, tokens=tokens)
                loss.backward()
                total += float(loss.detach()) * tokens
            norm = max(norm, self.optimizer.step())
        metrics = {"value/loss": total / int(batch.response_mask.sum()), "value/grad_norm": norm}
        explained = explained_variance(targets.values, targets.returns, batch.response_mask)
        return metrics if math.isnan(explained) else metrics | {"value/explained_variance": explained}

    def save(self, critic: Path, state: Path) -> dict[str, int]:
        """Write weights and optimizer moments; returns the counters that go with them."""
        for folder in (critic, state):
            folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.cpu().contiguous() for n, t in self.model.state_dict().items()}, critic / WEIGHTS)
        moments = {n: t.cpu().contiguous() for n, t in self.optimizer.state().items()}
        save_file(moments, state / OPTIMIZER)
        return {"critic_steps": self.optimizer.steps}

    def restore(self, critic: Path, state: Path, steps: int) -> None:
        """Continue after `steps` optimizer steps from what `save` wrote."""
        self.model.load_state_dict(load_file(critic / WEIGHTS, device=self.device))
        self.optimizer.restore(load_file(state / OPTIMIZER, device=self.device), steps)
