"""Reward `constant`: 1.0 for every response that is not truncated. It is for tasks that have only penalties."""

from rewards import Rollout, reward


@reward("constant")
def constant(rollout: Rollout) -> float:
    """1.0 for every response; penalties lower this value."""
    return 1.0
