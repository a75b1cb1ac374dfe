"""Defines the estimators of the advantages and the returns from which PPO learns. An estimator is a pure function of
tensors.

To add an estimator, for example an estimator without a critic, add a function here.
"""

from torch import Tensor

from rl.algorithm.gae import gae, normalize


def gae_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    final_values: Tensor,
    bootstrapped: Tensor | None = None,
    normalized: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the advantages with GAE (STEP3-VL-10B report, Eq. 1), and the returns that the critic learns (V_target
    in Eq. 3).

    Args:
        rewards: [N, R], the reward of each token.
        values: [N, R], the critic's values before each token.
        mask: [N, R] bool, True where the policy chose the token.
        gamma, lam: see `gae`.
        final_values: [N], the critic's values after the last token.
        bootstrapped: [N] bool. If it is True for a response, all rewards of this response are set to 0, and the
            argument `bootstrap` of `gae` is the response's final value. Step 3.5 Flash uses the final value in this
            way for responses that were cut. None means False for all responses.
        normalized: if True, the advantages get mean 0 and standard deviation 1 over all chosen tokens.
    Returns:
        advantages [N, R] and returns [N, R]. The returns are the advantages before normalisation plus `values`.
    """
    bootstrap = None
    if bootstrapped is not None:
        bootstrap = final_values * bootstrapped
        rewards = rewards.masked_fill(bootstrapped[:, None], 0.0)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    return normalize(advantages, mask) if normalized else advantages, returns
