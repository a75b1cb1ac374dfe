"""Shared by all stages: recipes, models, the PPO learner, checkpoints, and what a run records."""

import os

from rl.openmp import limit_spinning

limit_spinning(os.environ)
