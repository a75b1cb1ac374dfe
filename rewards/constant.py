"""The same value for every complete response: for tasks that have only penalties."""

from rewards import Rollout, reward


@reward("constant")
def constant(rollout: Rollout) -> float:
    """1.0 whatever the response; what its penalties leave of that is the task's reward."""
    return 1.0
