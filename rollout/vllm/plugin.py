"""What vLLM is taught in every one of its processes (entry point group `vllm.general_plugins`).

Light: only names are registered here; rollout/vllm/step_vl.py and rollout/weights/host.py are imported by
vLLM when it needs them.
"""

HOST_BACKEND = "host"  # name of our weight-transfer engine


def register() -> None:
    """Teach vLLM STEP3-VL's config, our cured model class and the host weight-transfer engine. Idempotent.

    With the config class known to `AutoConfig`, no checkpoint needs `trust_remote_code`.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.models import ModelRegistry

    from rl.model import config as step_vl

    step_vl.register()
    ModelRegistry.register_model(step_vl.ARCHITECTURE, "rollout.vllm.step_vl:PatchedStepVL")
    try:
        WeightTransferEngineFactory.register_engine(HOST_BACKEND, "rollout.weights.host", "HostWeightTransferEngine")
    except ValueError as error:
        if "already registered" not in str(error):
            raise
