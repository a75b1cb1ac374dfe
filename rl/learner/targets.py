"""Computes the targets of the updates from a batch and its values. The targets are the advantages for the policy and
the returns for the critic."""

from dataclasses import dataclass

from torch import Tensor

from rl.algorithm.advantages import gae_advantages
from rl.config import PPO
from rl.learner.batch import Batch


@dataclass(frozen=True)
class Targets:
    """The targets of a batch. Every tensor is [N, R] float32, 0 outside the response mask."""

    advantages: Tensor  # for the policy loss; normalised if `ppo.normalize_advantages`
    returns: Tensor  # the targets of the value loss: GAE advantages (not normalised) + values
    values: Tensor  # the values that the critic computed before its update


def make_targets(batch: Batch, values: Tensor, final: Tensor, ppo: PPO) -> Targets:
    """Returns the targets of a batch.

    Args:
        values: [N, R], the critic's values before each response token.
        final: [N], the critic's values after the last response token.
    """
    advantages, returns = gae_advantages(
        batch.rewards,
        values,
        batch.response_mask,
        gamma=ppo.gamma,
        lam=ppo.lam,
        final_values=final,
        bootstrapped=batch.truncated if ppo.truncated == "bootstrap" else None,
        normalized=ppo.normalize_advantages,
    )
    return Targets(advantages, returns, values)
