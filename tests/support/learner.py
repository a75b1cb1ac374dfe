"""Pictures, recipes and options for tests that run policy and critic on the models of tests/support/models.py."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rl.config import Config
from rl.learner.options import LearnerOptions
from tests.support.tiny import picture

PICTURES = [picture((60, 60), seed) for seed in range(2)]


def config(model: str, **ppo: object) -> Config:
    """A recipe of 4 prompts x 3 rollouts on the CPU in float32; `ppo` replaces options of that section."""
    return Config.model_validate_json(
        json.dumps(
            {
                "stage": "rlvr",
                "iterations": 1,
                "prompts_per_iteration": 4,
                "rollouts_per_prompt": 3,
                "max_sequence_length": 64,
                "model": {"path": model, "dtype": "float32"},
                "data": {"train": ["x.jsonl"]},
                "rewards": {"t": {"use": "exact"}},
                "ppo": {"minibatches": 2, "critic_minibatches": 2, "policy_warmup": 0, "critic_warmup": 0, **ppo},
                "learner": {"device": "cpu", "token_budget": 4096},
            }
        )
    )


def options(ppo: Mapping[str, object] | None = None, **changed: Any) -> LearnerOptions:
    """The learner's options of that recipe, with options of PPO and of the learner replaced."""
    return replace(LearnerOptions.of(config("unused", **(ppo or {}))), **changed)
