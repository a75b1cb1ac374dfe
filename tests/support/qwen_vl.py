"""Makes tiny Qwen2.5-VL and Qwen3-VL folders that vLLM can run, with a word-level tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.support import tiny

SPECIAL = (
    "<pad>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
EOS, START, END, IMAGE, VIDEO = (SPECIAL.index(f"<|{name}|>") for name in (
    "im_end", "vision_start", "vision_end", "image_pad", "video_pad"
))  # fmt: skip
WORDS = ("<think>", "</think>", *tiny.WORDS)
VOCABULARY = 64
MODELS: dict[str, Any] = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
FAMILIES = tuple(MODELS)
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 196 * 196  # so that a picture takes few tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def make(family: str, folder: Path, seed: int = 0, *, tied: bool = False) -> Any:
    """Saves and returns a float32 model of transformers' own class."""
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    decoder = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "eos_token_id": EOS,
        "bos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": tied,
    }  # fmt: skip
    tower = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
    if family == "qwen2_5_vl":
        tower |= {"fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14}
        config: Any = Qwen2_5_VLConfig(
            text_config=decoder | {"rope_parameters": rope}, vision_config=tower, tie_word_embeddings=tied, **ids
        )
    else:
        tower |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "patch_size": 16}
        text = decoder | {"head_dim": 32, "rope_parameters": rope | {"mrope_interleaved": True}}
        config = Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **ids)
    model = MODELS[family](config).float().eval()
    tiny.randomize(model, seed)
    model.save_pretrained(folder)
    _save_processor(folder, family)
    return model


def _save_processor(folder: Path, family: str) -> None:
    patch = 14 if family == "qwen2_5_vl" else 16
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=EOS).save_pretrained(folder)
    options = {
        "min_pixels": LEAST_PIXELS, "max_pixels": MOST_PIXELS, "patch_size": patch, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    video = {**options, "video_processor_type": "Qwen2VLVideoProcessor" if patch == 14 else "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    """Returns the ids of random words. Special tokens and think tags are not used."""
    first = len(SPECIAL) + 2
    return tuple(first + (i - len(tiny.SPECIAL)) for i in tiny.word_ids(count, seed))
