"""Compares the returns of a batch with values computed by hand."""

import torch

from rl.learner.batch import collate
from rl.learner.targets import make_targets
from rl.types import Prompt, Rollout, Scored
from tests.support.learner import options


def test_a_cut_response_gets_the_critics_value_if_the_recipe_bootstraps(folder):
    prompt = Prompt("p", "t", ())
    rollouts = [Rollout(prompt, "", f, (1,), (2, 3), (0.0, 0.0)) for f in ("stop", "length")]
    batch = collate([Scored(r, reward) for r, reward in zip(rollouts, (1.0, -1.0), strict=True)])
    values, final = torch.zeros(2, 2), torch.tensor([0.7, 0.6])
    lowest = make_targets(batch, values, final, options().ppo)
    assert lowest.returns.tolist() == [[1, 1], [-1, -1]]
    bootstrap = make_targets(batch, values, final, options({"truncated": "bootstrap"}).ppo)
    # The finished response keeps its reward. The cut response gets the critic's value after the last token (0.6)
    # instead of its reward.
    torch.testing.assert_close(bootstrap.returns, torch.tensor([[1, 1], [0.6, 0.6]]))
