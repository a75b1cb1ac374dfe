"""The policy in plain torch, without Ray. The policy makes optimizer steps for a batch and its targets.

Only the decoder is trained. The vision encoder and the projector have no gradients and no optimizer state. The features
of a picture are computed once, cached, and used as constants.
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
from rl.learner.batch import Batch, Group, collate, minibatches
from rl.learner.distributed import Ranks
from rl.learner.optimizer import Optimizer
from rl.learner.options import LearnerOptions
from rl.learner.packing import PackedRow
from rl.learner.sharded import Sharded
from rl.learner.targets import Targets
from rl.model import hf_folder
from rl.model.packed import PolicyModel
from rl.types import SYNTHESIS_TEMPLATE, Picture, Rollout, Scored

if TYPE_CHECKING:
    from rl.algorithm.verl_bridge import RolloutCorrection


def policy_loss(ppo: PPO) -> PolicyLoss:
    """Returns the policy loss that the recipe selects: one of verl's losses, or one of our two losses. We have two
    losses because the report can be read in two ways."""
    if ppo.policy_loss is not None:
        from rl.algorithm import verl_bridge

        return verl_bridge.policy_loss(ppo.policy_loss.verl, ppo.policy_loss.params)
    return policy_gradient_loss if ppo.ratio == "none" else partial(clipped_policy_loss, clip=ppo.clip)


def needs_old_logprobs(ppo: PPO) -> bool:
    """True if an update needs the logprobs of the policy before the update. These logprobs cost an additional forward
    pass over the batch."""
    return ppo.ratio == "clip" or ppo.tis_policy == "before_update" or ppo.rollout_correction is not None


class Policy(Sharded):
    """Computes logprobs and makes the PPO update of the decoder.

    A policy is a plain object. Ray creates one such object in the process of each rank.

    Args:
        folder: model folder to start from. The folder's tokenizer is copied into checkpoints.
    """

    def __init__(self, folder: str, options: LearnerOptions, ranks: Ranks | None = None) -> None:
        super().__init__(folder, options, ranks)
        ppo = options.ppo
        self.optimizer = Optimizer(self.trained, ppo, lr=ppo.policy_lr, warmup=ppo.policy_warmup)
        self.loss = policy_loss(ppo)
        self._encoded_bytes: dict[str, int] = {}
        files = {"chat_template.jinja": options.model.chat_template, SYNTHESIS_TEMPLATE: options.synthesis_template}
        self.templates = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file is not None}

    def prepare(self, base: Any) -> None:
        """Splits the decoder over the ranks, and freezes the parts in `options.model.freeze`."""
        self.model, self.decoder = base, PolicyModel(base.model, base.lm_head, base.never_sampled(base.config))
        self.ranks.shard(self.decoder, base.model.layers, self.dtype)
        frozen = tuple(p for name in self.options.model.freeze for p in base.frozen_prefixes[name])
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, keyed by their names on disk."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def encode(self, picture: Picture) -> Tensor:
        """Returns the features that the frozen encoder computes for a picture, [image tokens, hidden], on the CPU."""
        features = self.model.features([picture.load()])[0].cpu()
        self._encoded_bytes[picture.digest] = features.nbytes
        return features

    def encoded(self) -> dict[str, int]:
        """Returns {digest of a picture: size of its features in bytes} for all pictures that this process has encoded
        since the last call."""
        sizes, self._encoded_bytes = self._encoded_bytes, {}
        return sizes

    def weights(self) -> dict[str, Any]:
        """Returns the trained tensors on rank 0, keyed by their names on disk, in the dtype of the engines.
        Collective: every rank must call it."""
        tensors = self.ranks.gather(self.trained, self.dtype)
        if tensors and getattr(self.model.config, "tie_word_embeddings", False):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        named = {self.model.disk_name(name): tensor for name, tensor in tensors.items()}
        return {n: t.numpy() if t.dtype == torch.float32 else t for n, t in named.items()}

    def _forward(self, row: PackedRow, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the logprobs and the entropies of the responses in a packed row. Both are [k, longest]."""
        with self.ranks.autocast(self.dtype):
            logprobs, entropies = self.decoder(row, features, self.options.temperature)
        return row.padded(logprobs), row.padded(entropies)

    @torch.no_grad()
    def logprobs(self, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        """Returns the logprob of every response token under the current weights: [N, R] nats, 0 outside the mask."""
        result = torch.zeros(batch.response_mask.shape)
        for row in self.rows(batch.groups):
            values = self._forward(row, features)[0].cpu()
            if row.counts:
                row.write_to(result, values)
        return self.ranks.sum(result)

    def logprob_gap(self, rollouts: Sequence[Rollout], features: Mapping[str, Tensor]) -> float:
        """Returns the mean absolute difference, in nats, between the engine's and the learner's logprobs of response
        tokens. The engine must have sampled the responses with the policy's current weights."""
        batch = collate([Scored(r, 0.0) for r in rollouts])
        ours = self.logprobs(batch, features)
        gap = (ours - batch.rollout_logprobs).abs()
        return float(gap[batch.response_mask].mean())

    def update(
        self, batch: Batch, targets: Targets, features: Mapping[str, Tensor], iteration: int
    ) -> dict[str, float]:
        """Makes one pass over the batch in `ppo.minibatches` optimizer steps.

        Returns: the metrics policy/*.
        Raises: FloatingPointError if the gradient was not finite in too many steps in a row.
        """
        old = self.logprobs(batch, features) if needs_old_logprobs(self.options.ppo) else None
        sums: Sums = {}
        norm = lr = 0.0
        tokens = skipped = 0
        seed = f"{self.options.seed}-policy-{iteration}"
        for groups in minibatches(batch.groups, self.options.ppo.minibatches, seed):
            size, minibatch_sums = self._accumulate(groups, batch, targets, features, old)
            if not size.tokens:
                continue
            lr = self.optimizer.next_lr
            if (step_norm := self.optimizer.step()) is None:
                skipped += 1
                continue
            norm, tokens = max(norm, step_norm), tokens + size.tokens
            sums = add_sums(sums, minibatch_sums)
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
        """Accumulates the gradients of one minibatch, one packed row at a time.

        Returns: two values. The first value is the size of the minibatch, without the tokens and responses that verl's
        correction rejected. This size may be 0. The second value contains the statistics of the minibatch, summed over
        the tokens that were not rejected.
        """
        correction = self._correction(groups, batch, old)
        chosen = batch.response_mask if correction is None else correction.mask
        in_minibatch = chosen[[index for group in groups for index in group.rows]]
        size = MinibatchSize(int(in_minibatch.sum()), int(in_minibatch.any(-1).sum()))
        sums: Sums = {}
        device = self.ranks.device
        for row in self.rows(groups) if size.tokens else ():
            logprobs, entropies = self._forward(row, features)
            mask, sampled, advantages = (
                row.read_from(full).to(device) for full in (chosen, batch.rollout_logprobs, targets.advantages)
            )
            before = sampled if old is None else row.read_from(old).to(device)
            if correction is None:
                now = before if self.options.ppo.tis_policy == "before_update" else logprobs
                weights, tis = tis_weights(now, sampled, mask, cap=self.options.ppo.tis_cap)
            else:
                weights, tis = correction.weights, {}
                weights = None if weights is None else row.read_from(weights).to(device)
            loss, loss_sums = self.loss(logprobs, before, advantages, mask, size=size, weights=weights)
            bonus, entropy = entropy_loss(entropies, mask, tokens=size.tokens)
            total = loss + self.options.ppo.entropy * bonus if self.options.ppo.entropy else loss
            # FSDP averages gradients over the ranks, but we need their sum. So the loss is multiplied by the number of
            # ranks.
            (total * (row.counts * self.ranks.count)).backward()
            for row_sums in (tis, loss_sums, entropy, {"loss": total.detach() * size.tokens}):
                sums = add_sums(sums, {name: value * row.counts for name, value in row_sums.items()})
        sums = self.ranks.sum_named(sums)
        return size, sums if correction is None else add_sums(sums, correction.sums)

    def _correction(self, groups: Sequence[Group], batch: Batch, old: Tensor | None) -> "RolloutCorrection | None":
        """Returns verl's rollout correction of a whole minibatch as [N, R] tensors, or None if the recipe does not ask
        for a correction."""
        if self.options.ppo.rollout_correction is None or old is None:
            return None
        from rl.algorithm.verl_bridge import rollout_correction

        rows = torch.tensor([index for group in groups for index in group.rows])
        options = self.options.ppo.rollout_correction.verl.model_dump()
        if options["rollout_is"] is None:
            options["rollout_is_threshold"] = None
        corrected = rollout_correction(old[rows], batch.rollout_logprobs[rows], batch.response_mask[rows], **options)
        mask = torch.zeros_like(batch.response_mask).index_put((rows,), corrected.mask)
        weights = None if corrected.weights is None else torch.zeros_like(old).index_put((rows,), corrected.weights)
        return replace(corrected, mask=mask, weights=weights)

    def full_state(self) -> dict[str, Tensor]:
        """Returns the model's tensors on rank 0, in the dtype of the engines. Collective: every rank must call it."""
        return self.ranks.gather(hf_folder.state(self.model), self.dtype, copy=True)

    def write_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Writes a model folder that vLLM can load."""
        hf_folder.save(self.model, folder, source=self.source, templates=self.templates, tensors=tensors)

    def read_model(self, folder: Path) -> None:
        """Loads the weights if the folder has them in float32. Otherwise `restore` loads them from the training
        state."""
        if self.dtype == torch.float32:
            super().read_model(folder)

    def training_state(self) -> dict[str, Tensor]:
        """Returns AdamW's moments, and also the float32 weights if the model folder stores a smaller dtype."""
        return super().training_state() | (self.trained if self.dtype != torch.float32 else {})
