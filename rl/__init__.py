"""The code that all stages share: recipes, models, the PPO learner, checkpoints, and the records of a run."""

import os

from rl.openmp import limit_spinning

limit_spinning(os.environ)
