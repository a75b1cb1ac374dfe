"""The vLLM plugin (entry point group `vllm.general_plugins`). vLLM calls `register` in each of its processes.

`register` only registers names. vLLM imports rollout/vllm/step_vl.py and the weight transfer backend when it needs
them.
Tested in tests/rollout/vllm/test_engine.py.
"""

from rollout.weights.base import BACKEND, MODULE


def register() -> None:
    """Registers STEP3-VL's config, our model class PatchedStepVL and the weight transfer backend. This function
    may be called several times.

    After this call, `AutoConfig` knows the config class. So no checkpoint needs `trust_remote_code`.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.models import ModelRegistry

    from rl.model import config as step_vl

    step_vl.register()
    ModelRegistry.register_model(step_vl.ARCHITECTURE, "rollout.vllm.step_vl:PatchedStepVL")
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, MODULE, "Receiver")
    except ValueError as error:
        if "already registered" not in str(error):
            raise
