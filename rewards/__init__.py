"""Rewards. A reward takes a Rollout and returns a score. Each built-in reward is in its own file.

Authors of rewards import from this module. This module does not import torch.

A reward is a function with `@reward("name")` above it. A recipe refers to a reward by this name, by `pkg.module:Name`,
by `file.py:Name` (relative to the recipe), or by the name of an entry point of the group `rl.rewards`.
rewards.running.runner runs rewards in worker processes that can be killed. docs/writing_rewards.md explains how to
write a reward.
"""

from rewards.registry import BoundReward, Invalid, Score, get, names, penalty, reward, row_judge
from rl.types import Prompt, Rollout

__all__ = ["BoundReward", "Invalid", "Prompt", "Rollout", "Score", "get", "names", "penalty", "reward", "row_judge"]
