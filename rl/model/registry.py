"""Selects the class (model family) that builds the model of a config. To add a family, add its class here."""

from transformers import PretrainedConfig

from rl.model.architecture import Architecture
from rl.model.config import StepVLConfig
from rl.model.step_vl import StepVL
from rl.model.text import TextModel

FAMILIES: dict[str, type[Architecture]] = {StepVLConfig.model_type: StepVL}


def family(config: PretrainedConfig) -> type[Architecture]:
    """Returns the class for a config's `model_type`. If the type is not in FAMILIES, returns TextModel. TextModel
    checks the type when the model is built."""
    return FAMILIES.get(config.model_type, TextModel)
