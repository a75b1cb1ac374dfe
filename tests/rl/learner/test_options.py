"""Tests that the learner gets its options from the recipe."""

import json
from pathlib import Path

from rl.config import Config
from rl.learner.options import LearnerOptions
from tests.support.learner import config


def test_every_option_has_the_value_from_the_recipe():
    changes = {
        "seed": 5,
        "model": {
            "path": "m",
            "critic": "critic",
            "dtype": "bfloat16",
            "chat_template": "chat.jinja",
            "yarn": 2.0,
        },
        "rollout": {"temperature": 0.7},
        "synthesis": {"template": "shown.jinja"},
        "learner": {"token_budget": 128, "threads": 3, "activation_checkpointing": True},
    }
    recipe = Config.model_validate_json(json.dumps(config("m", gamma=0.5).model_dump(mode="json") | changes))
    assert LearnerOptions.of(recipe) == LearnerOptions(
        ppo=recipe.ppo,
        model=recipe.model,
        learner=recipe.learner,
        seed=5,
        temperature=0.7,
        synthesis_template=Path("shown.jinja"),
    )
    assert (recipe.model.critic, recipe.model.yarn, recipe.learner.threads) == (Path("critic"), 2.0, 3)
    assert recipe.ppo.gamma == 0.5
