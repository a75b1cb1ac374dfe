"""The code that all stages share: recipes, models, the PPO learner, checkpoints, and the records of a run."""

import os

from rl.cluster_token import set_token
from rl.openmp import limit_spinning

limit_spinning(os.environ)
set_token(os.environ)
