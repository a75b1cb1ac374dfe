"""Rewards: Rollout -> score, one file per reward. What an author of a reward imports; no torch in here.

A reward is a function with `@reward("name")` above it. Recipes find it by name, as `pkg.module:Name`,
as `file.py:Name` (relative to the recipe) or through an entry point of group `rl.rewards`. rewards.running.runner
runs it in worker processes that can be killed.
"""

from rewards.registry import BoundReward, Invalid, Score, get, names, penalty, reward, row_judge
from rl.types import Prompt, Rollout

__all__ = ["BoundReward", "Invalid", "Prompt", "Rollout", "Score", "get", "names", "penalty", "reward", "row_judge"]
