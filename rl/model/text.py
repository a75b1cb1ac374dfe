"""The Architecture of text-only Hugging Face decoders, which accept no pictures. All parameters of these models are
trained."""

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from rl.model.architecture import Architecture
from rl.model.rope import check_rope

FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""model_type in config.json -> name of the class in transformers and vLLM."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")


class TextModel(Architecture):
    """A decoder trunk and its head. On disk, the tensors have the same names as the tensors of
    `AutoModelForCausalLM`."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]] = {"encoder": (), "projector": ()}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def image_token(cls, config: Any) -> None:
        return None

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Returns an empty list. Raises ValueError if `pictures` is not empty."""
        if pictures:
            raise ValueError(f"{self.config.model_type} is a text model, but a prompt shows pictures")
        return []


def check_decoder(config: PretrainedConfig) -> None:
    """Raises ValueError if attention cannot be computed on packed rows, or if vLLM would compute another decoder."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(
            f"layer types {sorted(layers)} are not supported: packed groups need full attention in every layer"
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window is {window}, but packed groups need full attention; if no sequence is longer than "
            "the window, set it to null in config.json"
        )
    for name in DROPOUTS:
        if dropout := getattr(config, name, 0.0):
            raise ValueError(f"{name} is {dropout}; set it to 0, because PPO needs deterministic logprobs")
    if config.model_type in ("qwen3", "qwen3_vl_text") and config.attention_bias:
        raise ValueError("attention_bias is true, but vLLM's Qwen3 has no bias in its output projection (o_proj)")
    check_rope(config.rope_parameters or {})
