"""Text-only Hugging Face decoders behind the same protocol as StepVL: no pictures, everything is trained."""

from collections.abc import Sequence
from typing import ClassVar

from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

FAMILIES = ("qwen3", "qwen2", "llama")


class TextModel(nn.Module):
    """A decoder trunk and its head, with the tensor names of `AutoModelForCausalLM` on disk."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]] = {"encoder": (), "projector": ()}
    image_token_id = None

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        if config.model_type not in FAMILIES:
            raise ValueError(f"model_type {config.model_type!r} is not built; text models can be {', '.join(FAMILIES)}")
        self.config = config
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Raises ValueError unless `pictures` is empty."""
        if pictures:
            raise ValueError(f"{self.config.model_type} is a text model, but a prompt shows pictures")
        return []


def packable(config: PretrainedConfig) -> None:
    """Raises ValueError for decoder variants whose attention the packed layout does not express."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(
            f"layer types {sorted(layers)} are not built: packed groups need full attention in every layer"
        )
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout is {dropout}; PPO needs deterministic logprobs, set it to 0")
