"""From rewards and values to what both updates aim at: advantages and returns."""

from dataclasses import dataclass

from torch import Tensor

from rl.algorithm.gae import gae, normalize
from rl.config import PPO
from rl.learner.packing import Batch


@dataclass(frozen=True)
class Targets:
    """Every tensor is [N, R] float32, 0 outside the response mask."""

    advantages: Tensor  # as the policy loss uses them: normalised if the recipe says so
    returns: Tensor  # what the critic regresses to: GAE advantages (not normalised) + values
    values: Tensor  # the critic's estimates before its update


def make_targets(batch: Batch, values: Tensor, final: Tensor, ppo: PPO) -> Targets:
    """GAE over the batch (report, Eq. 1; V_target of Eq. 3).

    Args:
        values: [N, R], the critic's values before each response token.
        final: [N], its values after the last one; used for cut responses when `ppo.truncated` is bootstrap.
    """
    bootstrap, rewards = None, batch.rewards
    if ppo.truncated == "bootstrap":  # R = V(s_T), as in Step 3.5 Flash: no reward of its own
        bootstrap = final * batch.truncated
        rewards = rewards.masked_fill(batch.truncated[:, None], 0.0)
    advantages, returns = gae(rewards, values, batch.response_mask, gamma=ppo.gamma, lam=ppo.lam, bootstrap=bootstrap)
    if ppo.normalize_advantages:
        advantages = normalize(advantages, batch.response_mask)
    return Targets(advantages, returns, values)
