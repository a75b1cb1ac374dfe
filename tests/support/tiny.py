"""Makes tiny model folders that vLLM can run: STEP3-VL or a text decoder, with a word-level tokenizer."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl.model import hf_folder
from rl.model.config import StepVLConfig
from rl.model.step_vl import StepVL
from rl.types import Picture

IMAGE_WORDS = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
SPECIAL = ("<pad>", "<eos>", *IMAGE_WORDS)
WORDS = tuple(f"w{i}" for i in range(40))
EOS, IMAGE = SPECIAL.index("<eos>"), SPECIAL.index("<im_patch>")
VOCABULARY = 56  # larger than the number of words; not a multiple of 64, so vLLM must round it up
# The global view has 6 x 6 tokens, and a crop has 5 x 5 tokens. A token covers 28 x 28 pixels. The sizes of
# global view and crop are so similar that a picture can have exactly one crop.
GLOBAL_SIZE, CROP_SIZE = 168, 140
NO_CROP, ONE_CROP, FOUR_CROPS = (60, 50), (168, 150), (200, 190)  # (width, height) in pixels


def word_ids(count: int, seed: int = 0) -> tuple[int, ...]:
    """Returns the ids of random words. Special tokens are not used."""
    first = len(SPECIAL)
    return tuple(np.random.default_rng(seed).integers(first, first + len(WORDS), count).tolist())


def image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Returns an image of 5 x 5 blocks, each in a random colour. Different seeds give different images at any size."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def picture(size: tuple[int, int], seed: int = 0) -> Picture:
    """Returns the result of `image` as PNG bytes, like the picture of a data row."""
    encoded = io.BytesIO()
    image(size, seed).save(encoded, "PNG")
    return Picture.of(encoded.getvalue())


def make_text_model(folder: Path, *, tied: bool, seed: int = 0) -> Qwen3ForCausalLM:
    """Saves and returns a float32 Qwen3 model. The generation config in the folder makes sampling nearly greedy, so
    that tests notice if an engine uses this config."""
    model = Qwen3ForCausalLM(Qwen3Config(**decoder(), tie_word_embeddings=tied)).float().eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def make_step_vl(folder: Path, seed: int = 0) -> StepVL:
    """Saves and returns a STEP3-VL model. As in the 10B model, the image token is also an end-of-sequence token."""
    config = StepVLConfig(
        vision_config={
            "image_size": GLOBAL_SIZE,
            "patch_size": 7,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": 2.0,
        },
        text_config=decoder() | {"eos_token_id": [EOS, IMAGE]},
        image_token_id=IMAGE,
        image_token_len=36,
        patch_token_len=25,
    )
    model = hf_folder.build(config, device="cpu").float().eval()
    assert isinstance(model, StepVL)
    randomize(model, seed)
    hf_folder.save(model, folder)
    save_tokenizer(folder)
    return model


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Sets random weights. Each matrix has unit gain, and the scales of norms are near 1. So every input changes every
    output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (not name.endswith("bias")))


def decoder() -> dict[str, Any]:
    """Returns the options of a decoder's config."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "eos_token_id": EOS,
        "architectures": ["Qwen3ForCausalLM"],
    }


def save_tokenizer(folder: Path) -> None:
    """Saves a tokenizer with one token per word, and a generation config."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=list(IMAGE_WORDS),
    ).save_pretrained(folder)
    GenerationConfig(do_sample=True, temperature=0.1, top_k=1, top_p=0.5).save_pretrained(folder)
