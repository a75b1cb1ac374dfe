"""The STEP3-VL configuration (`model_type: step_robotics`), and the extension of a decoder's positions by YaRN.

With these classes, transformers loads the model without `trust_remote_code`. The defaults come from the config.json of
the published 10B model. This module does not build models, so that our vLLM plug-in and the checks of a recipe can read
a config quickly. YaRN is tested in tests/rollout/vllm/test_yarn.py.
"""

import math
from typing import Any

from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from rl.model.config_file import with_booleans
from rl.model.rope import transformers_temperature

ARCHITECTURE = "StepVLForConditionalGeneration"
DOWNSAMPLING = 4  # two stride-2 convolutions make each side 4 times smaller


class StepVLVisionConfig(PretrainedConfig):
    """The config of the Perception Encoder (PE-lang G/14) with absolute positions, 2-D RoPE and layer scale."""

    model_type = "step_vl_vision"

    image_size: int = 728
    patch_size: int = 14
    width: int = 1536
    layers: int = 47
    heads: int = 16
    mlp_ratio: float = 8960 / 1536
    ls_init_value: float | None = 0.1
    hidden_act: str = "quick_gelu"
    output_dim: int | None = None
    pool_type: str = "none"
    use_cls_token: bool = False
    use_ln_pre: bool = True
    use_ln_post: bool = False
    use_abs_posemb: bool = True
    use_rope2d: bool = True

    def __post_init__(self, **kwargs: Any) -> None:  # transformers turns this class into a dataclass
        super().__post_init__(**kwargs)
        for name, built in {
            "use_cls_token": False,
            "ues_cls_token": False,  # the spelling in published configs
            "use_abs_posemb": True,
            "use_rope2d": True,
            "hidden_act": "quick_gelu",
            "pool_type": "none",
        }.items():
            if (value := with_booleans(getattr(self, name, built))) != built:
                raise ValueError(
                    f"vision_config.{name} is {value!r}; only {built!r} is supported, "
                    "which is the value of STEP3-VL's encoder"
                )


class StepVLConfig(PretrainedConfig):
    """The config of the whole model: vision tower, projector and Qwen3 decoder."""

    model_type = "step_robotics"
    sub_configs = {"vision_config": StepVLVisionConfig, "text_config": Qwen3Config}  # noqa: RUF012 (transformers' own idiom)

    def __init__(
        self,
        vision_config: dict[str, Any] | StepVLVisionConfig | None = None,
        text_config: dict[str, Any] | Qwen3Config | None = None,
        image_token_id: int = 151679,
        image_token_len: int = 169,
        patch_token_len: int = 81,
        understand_projector_stride: int = 2,
        projector_bias: bool = False,
        vision_select_layer: int = -1,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        projector_bias, tie_word_embeddings = with_booleans(projector_bias), with_booleans(tie_word_embeddings)
        if not isinstance(vision_config, StepVLVisionConfig):
            vision_config = StepVLVisionConfig(**(vision_config or {}))
        if not isinstance(text_config, Qwen3Config):
            text_config = Qwen3Config(**(_TEXT_10B if text_config is None else _as_qwen3(text_config)))
        text_config.architectures = ["Qwen3ForCausalLM"]  # vLLM selects the decoder class by this name
        text_config.tie_word_embeddings = tie_word_embeddings
        self.vision_config = vision_config
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.image_token_len = image_token_len
        self.patch_token_len = patch_token_len
        self.understand_projector_stride = understand_projector_stride
        self.projector_bias = projector_bias
        self.vision_select_layer = vision_select_layer
        self.tie_word_embeddings = tie_word_embeddings
        # Folders that the public remote class has saved repeat the decoder's hidden_size here, and name that class.
        hidden = kwargs.pop("hidden_size", None)
        if hidden not in (None, self.hidden_size):
            raise ValueError(f"hidden_size is {hidden}, but text_config.hidden_size is {self.hidden_size}")
        super().__init__(**kwargs | {"architectures": [ARCHITECTURE]})
        if self.global_size != vision_config.image_size:
            raise ValueError(
                f"image_token_len {image_token_len} means a global view of {self.global_size} pixels (with "
                f"patches of {vision_config.patch_size} pixels), but vision_config.image_size is "
                f"{vision_config.image_size}"
            )

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def global_size(self) -> int:
        """The side length of the global view in pixels: 728 for the 10B model."""
        return self._side(self.image_token_len, "image_token_len")

    @property
    def crop_size(self) -> int:
        """The side length of a crop in pixels: 504 for the 10B model."""
        return self._side(self.patch_token_len, "patch_token_len")

    def _side(self, tokens: int, name: str) -> int:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"{name} is {tokens}; views are square, so this number of tokens must be a square number")
        return side * DOWNSAMPLING * self.vision_config.patch_size


_TEXT_10B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": [151643, 151645, 151679],
}


def _as_qwen3(text_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint's text_config without the keys that select a class, such as `model_type`."""
    return {k: v for k, v in text_config.items() if k not in {"model_type", "architectures", "auto_map"}}


def register() -> None:
    """Registers `step_robotics` with `AutoConfig`. The function may be called several times."""
    AutoConfig.register(StepVLConfig.model_type, StepVLConfig, exist_ok=True)


def with_yarn(config: PretrainedConfig, factor: float | None) -> PretrainedConfig:
    """Multiplies the decoder's number of positions by `factor` with YaRN (arXiv 2309.00071). Returns the config.

    The temperature of attention does not change, as in PaCoRe's evaluation (arXiv 2601.05593), which uses the factor
    2.0. The factor multiplies the number of positions that the model was trained with, even if the config already uses
    YaRN. If `factor` is None, the config is not changed.

    Raises: ValueError if the config extends its positions by another method, or by YaRN with another temperature, or
        if the model is a Phi-3, whose class in transformers accepts no YaRN.
    """
    if factor is None:
        return config
    text = getattr(config, "text_config", config)
    if text.model_type == "phi3":
        raise ValueError("model.yarn cannot extend a Phi-3 model, because transformers' Phi-3 accepts no YaRN")
    if "mrope_section" in text.rope_parameters:
        raise ValueError(f"model.yarn is not supported for {config.model_type}, which has three positions per token")
    rope = dict(text.rope_parameters)
    if (kind := rope.get("rope_type", "default")) not in ("default", "yarn"):
        raise ValueError(f"the positions are already extended by {kind}; YaRN cannot extend them again")
    if kind == "yarn" and (found := transformers_temperature(rope)) != 1.0:
        raise ValueError(
            f"the model was trained with YaRN and an attention temperature of {found:g}, but model.yarn uses 1; "
            "leave out model.yarn, or extend a model without YaRN"
        )
    trained = trained_positions(config)
    text.rope_parameters = {
        "rope_theta": rope["rope_theta"],
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": trained,
        # transformers reads the first of these three keys, vLLM reads the other two. Both ignore keys that they do not
        # know.
        "attention_factor": 1.0,
        "attn_factor": 1.0,
        "apply_yarn_scaling": False,
    }
    text.max_position_embeddings = int(trained * factor)
    return config


def trained_positions(config: PretrainedConfig) -> int:
    """Returns the number of positions that the model was trained with, without any extension by YaRN."""
    text = getattr(config, "text_config", config)
    return (text.rope_parameters or {}).get("original_max_position_embeddings") or text.max_position_embeddings


def positions(config: PretrainedConfig) -> int:
    """Returns the maximum number of tokens in a sequence."""
    return getattr(config, "text_config", config).max_position_embeddings


def overrides(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the config's options for positions, in the format of vLLM's --hf-overrides."""
    text = getattr(config, "text_config", None)
    names = ("rope_parameters", "max_position_embeddings")
    values = {name: getattr(text or config, name) for name in names}
    return {"text_config": values} if text else values
