"""The vLLM plugin (entry point group `vllm.general_plugins`). vLLM calls `register` in each of its processes.

`register` only registers names. vLLM imports rollout/vllm/step_vl.py and the weight transfer backend when it needs
them.
Tested in tests/rollout/vllm/test_engine.py.
"""

from typing import TYPE_CHECKING, Any

from rollout.weights.base import BACKEND, MODULE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FORMAT = "step3_vl_rl"  # the name of our reader of config.json in vLLM


def register() -> None:
    """Registers STEP3-VL's config and its reader, our model class PatchedStepVL and the weight transfer backend. This
    function may be called several times.

    After this call, `AutoConfig` knows the config class. So no checkpoint needs `trust_remote_code`.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.models import ModelRegistry

    from rl.model import config as step_vl

    step_vl.register()
    _register_reader()
    ModelRegistry.register_model(step_vl.ARCHITECTURE, "rollout.vllm.step_vl:PatchedStepVL")
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, MODULE, "Receiver")
    except ValueError as error:
        if "already registered" not in str(error):
            raise


def _register_reader() -> None:
    """Makes vLLM read a config.json with the function that the learner uses, if the engine asks for CONFIG_FORMAT."""
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER, register_config_parser
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    if CONFIG_FORMAT in _CONFIG_FORMAT_TO_CONFIG_PARSER:
        return

    class Reader(ConfigParserBase):
        def parse(self, model: Any, *_: Any, **__: Any) -> "tuple[dict[str, Any], PretrainedConfig]":
            from rl.model import config_file, hf_folder

            folder = hf_folder.local_folder(model)
            config = hf_folder.read_config(folder)
            text: Any = config.get_text_config()
            text.architectures = text.architectures or config.architectures  # vLLM on CPU needs it for Qwen3-VL
            return config_file.read(folder), config

    register_config_parser(CONFIG_FORMAT)(Reader)
