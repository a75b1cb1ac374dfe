"""Makes small random models for tests: a StepVL with 112-pixel views, and a Qwen3 text decoder."""

from typing import TypeVar

import torch

from rl.model import hf_folder
from rl.model.config import StepVLConfig
from rl.model.step_vl import StepVL
from rl.model.text import TextModel

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
IMAGE_TOKEN = 7
M = TypeVar("M", bound=torch.nn.Module)


def step_vl(seed: int = 0) -> StepVL:
    """Returns a model with a 112-pixel global view (4 image tokens) and 56-pixel crops (1 image token). All parameters
    are random, including the parameters of norms."""
    vision = {"image_size": 112, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    config = StepVLConfig(
        vision_config=vision, text_config=TEXT, image_token_id=IMAGE_TOKEN, image_token_len=4, patch_token_len=1
    )
    model = hf_folder.build(config, device="cpu")
    assert isinstance(model, StepVL)
    return randomized(model, seed)


def text_model(seed: int = 0, *, tied: bool = False) -> TextModel:
    from transformers import Qwen3Config

    config = Qwen3Config(**TEXT, tie_word_embeddings=tied, architectures=["Qwen3ForCausalLM"])
    model = hf_folder.build(config, device="cpu")
    assert isinstance(model, TextModel)
    return randomized(model, seed)


def randomized(model: M, seed: int) -> M:
    """Sets random weights that are large enough for every input to change every output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def transformers_name(name: str) -> str:
    """Returns the name that transformers gives to a tensor of a vision-language model."""
    if name.startswith("lm_head"):
        return name
    return "model.language_" + name if name.startswith("model.") else f"model.{name}"
