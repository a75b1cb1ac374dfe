"""The Architecture of text-only Hugging Face decoders, which accept no pictures. All parameters of these models are
trained."""

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from rl.model.architecture import Architecture

FAMILIES = ("qwen3", "qwen2", "llama")


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


def check_packable(config: PretrainedConfig) -> None:
    """Raises ValueError if the decoder's attention cannot be computed on packed rows."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(
            f"layer types {sorted(layers)} are not supported: packed groups need full attention in every layer"
        )
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout is {dropout}; set it to 0, because PPO needs deterministic logprobs")
