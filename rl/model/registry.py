"""Selects the class (model family) that builds the model of a config. A new family is added here."""

from transformers import PretrainedConfig

from rl.model.architecture import Architecture
from rl.model.config import StepVLConfig
from rl.model.step_vl import StepVL
from rl.model.text import TextModel

FAMILIES: dict[str, type[Architecture]] = {StepVLConfig.model_type: StepVL}


def family(config: PretrainedConfig) -> type[Architecture]:
    """Returns the class for a config's `model_type`. The class for all unlisted types is TextModel, which checks the
    type when the model is built."""
    return FAMILIES.get(config.model_type, TextModel)
