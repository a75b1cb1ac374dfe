"""The policy in plain torch: a batch and its targets in, optimizer steps out. Knows nothing of Ray.

Only the decoder is trained. The vision encoder and the projector hold no gradient and no optimizer state; their
features come from a cache and enter as constants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rl.algorithm.losses import (
    MinibatchSize,
    PolicyLoss,
    Sums,
    add_sums,
    clipped_policy_loss,
    entropy_loss,
    finish_sums,
    policy_gradient_loss,
    tis_weights,
)
from rl.config import PPO
from rl.learner.distributed import Ranks
from rl.learner.options import LearnerOptions
from rl.learner.packing import Batch, Group, PackedRow, collate, minibatches
from rl.learner.sharded import Sharded
from rl.learner.targets import Targets
from rl.model import hf_folder
from rl.model.packed import PolicyModel
from rl.types import SYNTHESIS_TEMPLATE, Picture, Rollout, Scored

if TYPE_CHECKING:
    from rl.algorithm.verl_bridge import RolloutCorrection


def policy_loss(ppo: PPO) -> PolicyLoss:
    """The loss a recipe names: ours in either reading of the report, or one of verl's."""
    if ppo.policy_loss is not None:
        from rl.algorithm import verl_bridge

        return verl_bridge.policy_loss(ppo.policy_loss.verl, ppo.policy_loss.params)
    return policy_gradient_loss if ppo.ratio == "none" else partial(clipped_policy_loss, clip=ppo.clip)


def needs_old_logprobs(ppo: PPO) -> bool:
    """Whether an update compares with the policy from before it, which costs a forward pass over the batch."""
    return ppo.ratio == "clip" or ppo.tis_policy == "before_update" or ppo.rollout_correction is not None


class Policy(Sharded):
    """Logprobs and the PPO update of the decoder. A plain object; Ray places it, possibly split over several ranks.

    Args:
        folder: model folder to start from; later checkpoints copy its tokenizer.
    """

    def __init__(self, folder: str, options: LearnerOptions, ranks: Ranks | None = None) -> None:
        super().__init__(folder, options, ranks)
        self.optimizer = self.adamw(self.trained, options.ppo.policy_lr, options.ppo.policy_warmup)
        self.loss = policy_loss(options.ppo)
        self._encoded: dict[str, int] = {}
        named = {"chat_template.jinja": options.chat_template, SYNTHESIS_TEMPLATE: options.synthesis_template}
        self.templates = {name: file.read_text(encoding="utf-8") for name, file in named.items() if file is not None}

    def prepare(self, base: Any) -> None:
        """Freeze what is frozen, and split the rest over the ranks."""
        self.model, self.decoder = base, PolicyModel(base.model, base.lm_head)
        self.ranks.shard(self.decoder, base.model.layers, self.dtype)
        frozen = tuple(p for name in self.options.freeze for p in base.frozen_prefixes[name])
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """By name on disk."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def encode(self, picture: Picture) -> Tensor:
        """The frozen encoder's features, [image tokens, hidden], on the CPU."""
        features = self.model.features([picture.load()])[0].cpu()
        self._encoded[picture.digest] = features.nbytes
        return features

    def encoded(self) -> dict[str, int]:
        """Digest -> bytes of the features that this process has computed since it was asked last."""
        told, self._encoded = self._encoded, {}
        return told

    def weights(self) -> dict[str, Any]:
        """The trained tensors by their names on disk, in the type the engines compute in; on the first rank."""
        tensors = self.ranks.gathered(self.trained, self.dtype)
        if tensors and getattr(self.model.config, "tie_word_embeddings", False):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        return {n: t.numpy() if t.dtype == torch.float32 else t for n, t in tensors.items()}

    def _forward(self, row: PackedRow, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, [k, longest], of the responses in a packed row."""
        with self.ranks.autocast(self.dtype):
            found = self.decoder(row.pack, features, self.options.temperature)
        return row.pack.padded(found[0]), row.pack.padded(found[1])

    @torch.no_grad()
    def logprobs(self, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        """Of every response token under the present weights: [N, R] nats, 0 outside the mask."""
        result = torch.zeros(batch.response_mask.shape)
        for row in self.rows(batch.groups):
            values = self._forward(row, features)[0].cpu()
            if row.counts:
                row.pack.put(result, values)
        return self.ranks.sum(result)

    def logprob_gap(self, rollouts: Sequence[Rollout], features: Mapping[str, Tensor]) -> float:
        """Mean |engine - learner| over the response tokens, in nats; the engine had the present weights."""
        batch = collate([Scored(r, 0.0) for r in rollouts])
        ours = self.logprobs(batch, features)
        gap = (ours - batch.rollout_logprobs).abs()
        return float(gap[batch.response_mask].mean())

    def update(
        self, batch: Batch, targets: Targets, features: Mapping[str, Tensor], iteration: int
    ) -> dict[str, float]:
        """One pass over the batch in `ppo.minibatches` optimizer steps. Returns policy/* metrics.

        Raises: FloatingPointError if gradients were not finite too often in a row.
        """
        old = self.logprobs(batch, features) if needs_old_logprobs(self.options.ppo) else None
        sums: Sums = {}
        norm = lr = 0.0
        tokens = skipped = 0
        seed = f"{self.options.seed}-policy-{iteration}"
        for groups in minibatches(batch.groups, self.options.ppo.minibatches, seed):
            size, found = self._accumulate(groups, batch, targets, features, old)
            if not size.tokens:
                continue
            lr = self.optimizer.next_lr
            if (step := self.optimizer.step()) is None:
                skipped += 1
                continue
            norm, tokens, sums = max(norm, step), tokens + size.tokens, add_sums(sums, found)
        numbers = {"policy/grad_norm": norm, "policy/lr": lr, "policy/skipped_steps": float(skipped)}
        return finish_sums(sums, max(1, tokens)) | numbers

    def _accumulate(
        self,
        groups: Sequence[Group],
        batch: Batch,
        targets: Targets,
        features: Mapping[str, Tensor],
        old: Tensor | None,
    ) -> tuple[MinibatchSize, Sums]:
        """Add one minibatch's gradients, packed row by packed row.

        Returns: how much of it counts (verl's correction may reject tokens, even all of them), and its statistics,
        summed over those tokens.
        """
        correction = self._correction(groups, batch, old)
        chosen = batch.response_mask if correction is None else correction.mask
        mine = chosen[[index for group in groups for index in group.rows]]
        size = MinibatchSize(int(mine.sum()), int(mine.any(-1).sum()))
        sums: Sums = {}
        device = self.ranks.device
        for row in self.rows(groups) if size.tokens else ():
            logprobs, entropies = self._forward(row, features)
            mask, sampled, advantages = (
                row.pack.part(full).to(device) for full in (chosen, batch.rollout_logprobs, targets.advantages)
            )
            before = sampled if old is None else row.pack.part(old).to(device)
            if correction is None:
                now = before if self.options.ppo.tis_policy == "before_update" else logprobs
                weights, tis = tis_weights(now, sampled, mask, cap=self.options.ppo.tis_cap)
            else:
                weights, tis = correction.weights, {}
                weights = None if weights is None else row.pack.part(weights).to(device)
            loss, drift = self.loss(logprobs, before, advantages, mask, size=size, weights=weights)
            bonus, spread = entropy_loss(entropies, mask, tokens=size.tokens)
            total = loss + self.options.ppo.entropy * bonus if self.options.ppo.entropy else loss
            # FSDP averages gradients over the ranks; the loss is a sum over all of them.
            (total * (row.counts * self.ranks.count)).backward()
            for found in (tis, drift, spread, {"loss": total.detach() * size.tokens}):
                sums = add_sums(sums, {name: value * row.counts for name, value in found.items()})
        sums = self.ranks.totals(sums)
        return size, sums if correction is None else add_sums(sums, correction.sums)

    def _correction(self, groups: Sequence[Group], batch: Batch, old: Tensor | None) -> "RolloutCorrection | None":
        """verl's rollout correction, if the recipe asks for it: over a whole minibatch, before it is split."""
        if self.options.ppo.rollout_correction is None or old is None:
            return None
        from rl.algorithm.verl_bridge import rollout_correction

        rows = torch.tensor([index for group in groups for index in group.rows])
        options = self.options.ppo.rollout_correction.verl.model_dump()
        if options["rollout_is"] is None:
            options["rollout_is_threshold"] = None
        found = rollout_correction(old[rows], batch.rollout_logprobs[rows], batch.response_mask[rows], **options)
        whole = torch.zeros_like(batch.response_mask).index_put((rows,), found.mask)
        weights = None if found.weights is None else torch.zeros_like(old).index_put((rows,), found.weights)
        return replace(found, mask=whole, weights=weights)

    def whole(self) -> dict[str, Tensor]:
        """The model in the type the engines compute in."""
        return self.ranks.gathered(hf_folder.state(self.model), self.dtype, copy=True)

    def write_whole(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """A folder that loads in vLLM."""
        hf_folder.save(self.model, folder, source=self.source, templates=self.templates, tensors=tensors)

    def read_whole(self, folder: Path) -> None:
        """The float32 weights, unless a smaller type made `shards` keep them."""
        if self.dtype == torch.float32:
            super().read_whole(folder)

    def shards(self) -> dict[str, Tensor]:
        """Moments, and the float32 weights if the model folder has them in a smaller type."""
        return super().shards() | (self.trained if self.dtype != torch.float32 else {})
