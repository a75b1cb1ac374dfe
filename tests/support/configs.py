"""A small config for tests that read options and start no process."""

import json
from typing import Any

from rl.config import Config

SMALL: dict[str, Any] = {
    "stage": "rlvr",
    "iterations": 1,
    "prompts_per_iteration": 2,
    "rollouts_per_prompt": 2,
    "max_sequence_length": 64,
    "model": {"path": "m"},
    "data": {"train": "d"},
    "rewards": {"math": {"use": "math_verify"}},
    "ppo": {"minibatches": 1, "critic_minibatches": 1},
}


def config(**changes: Any) -> Config:
    """Returns the config SMALL with changes, given as `section__option=value`."""
    values = json.loads(json.dumps(SMALL))
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return Config.model_validate_json(json.dumps(values))
