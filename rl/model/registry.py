"""Selects the class (model family) that builds the model of a config. To add a family, add its class here."""

from transformers import PretrainedConfig

from rl.model.architecture import Architecture
from rl.model.config import StepVLConfig
from rl.model.qwen_vl import FAMILIES as QWEN_VL
from rl.model.step_vl import StepVL
from rl.model.text import FAMILIES as TEXT_FAMILIES
from rl.model.text import TextModel

FAMILIES: dict[str, type[Architecture]] = {
    StepVLConfig.model_type: StepVL,
    **QWEN_VL,
    **dict.fromkeys(TEXT_FAMILIES, TextModel),
}
"""model_type in config.json -> class of the model."""


def family(config: PretrainedConfig) -> type[Architecture]:
    """Returns the class for a config's `model_type`. Raises KeyError if the type is not supported;
    `hf_folder.read_config` refuses such configs."""
    return FAMILIES[config.model_type]
