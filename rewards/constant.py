"""The same value for every complete response: for tasks that have only penalties."""

from rewards import Rollout, reward


@reward("constant")
def constant(rollout: Rollout) -> float:
    """1.0 for every response; the task's reward is 1.0 lowered by its penalties."""
    return 1.0
