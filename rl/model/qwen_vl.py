"""Qwen2.5-VL and dense Qwen3-VL: transformers' vision towers and decoders, on packed rows.

These models have three positions for each token: time, row and column (M-RoPE, Qwen2-VL report, arXiv 2409.12191,
section 2.1). All tokens of a picture have the same time. A text token has three equal positions, one after the largest
position before it. Qwen3-VL also adds features of several layers of its tower to the first layers of the decoder
(deepstack). The features of these layers are stored side by side with the features of the picture.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel

from rl.model import config_file
from rl.model.architecture import Architecture, ImageToken
from rl.model.layout import Size

IMAGE, TEXT = "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"


class QwenVL(Architecture):
    """The vision tower with its merger, the decoder and its head. A subclass names transformers' classes."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]] = {
        "encoder": ("visual.",),
        "projector": ("visual.merger.", "visual.deepstack_merger_list."),
    }
    tower: ClassVar[type[Any]]
    trunk: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        self.visual = self.tower._from_config(config.vision_config)
        self.model = self.trunk._from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def complete(cls, config: Any, folder: Path) -> None:
        config.preprocessor = config_file.preprocessor(folder)

    @classmethod
    def image_token(cls, config: Any) -> ImageToken:
        processor = image_processor(config)

        def expansion(size: Size) -> int:
            rows, columns = grid(size, processor)
            return rows * columns

        def words(size: Size) -> list[str]:
            return [IMAGE] * expansion(size)

        def shown(size: Size) -> Size:
            return resized(size, processor)

        return ImageToken(TEXT, IMAGE, config.image_token_id, expansion, words, shown)

    @classmethod
    def never_sampled(cls, config: Any) -> tuple[int, ...]:
        """The image token and the video token: no encoder has features for them in a response."""
        return config.image_token_id, config.video_token_id

    @classmethod
    def positions(cls, config: Any, prompt_ids: Sequence[int], sizes: Sequence[Size]) -> tuple[Tensor, int]:
        grids = [grid(size, image_processor(config)) for size in sizes]
        return picture_positions([token == config.image_token_id for token in prompt_ids], grids)

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Returns the features of each picture, [image tokens, hidden * (1 + deepstack layers)]."""
        if not pictures:
            return []
        weight = next(self.visual.parameters())
        inputs: Any = image_processor(self.config)(images=list(pictures), return_tensors="pt")
        grids = inputs["image_grid_thw"].to(weight.device)
        pixels = inputs["pixel_values"].to(weight.device, weight.dtype)
        out = self.visual(pixels, grid_thw=grids, return_dict=True)
        parts = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        counts = (grids.prod(-1) // self.visual.spatial_merge_size**2).tolist()
        return list(torch.cat([torch.cat(list(p)) if isinstance(p, tuple) else p for p in parts], -1).split(counts))

    def materialize(self, device: str) -> None:
        super().materialize(device)
        rotary = self.visual.rotary_pos_emb
        with torch.device(device):
            self.visual.rotary_pos_emb = type(rotary)(2 * rotary.inv_freq.shape[0])


class Qwen25VL(QwenVL):
    """Qwen2.5-VL (`model_type: qwen2_5_vl`)."""

    tower, trunk = Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLTextModel


class Qwen3VL(QwenVL):
    """Dense Qwen3-VL (`model_type: qwen3_vl`)."""

    tower, trunk = Qwen3VLVisionModel, Qwen3VLTextModel
    disk_prefixes: ClassVar[tuple[tuple[str, str], ...]] = (
        ("model.", "model.language_model."),
        ("visual.", "model.visual."),
    )


FAMILIES: dict[str, type[QwenVL]] = {Qwen2_5_VLConfig.model_type: Qwen25VL, Qwen3VLConfig.model_type: Qwen3VL}


def image_processor(config: Any) -> Any:
    """Returns transformers' image processor with the options of the folder's preprocessor_config.json, which
    `complete` has added to the config."""
    return _image_processor(json.dumps(config.preprocessor, sort_keys=True))


@lru_cache(maxsize=16)
def _image_processor(options: str) -> Any:
    return Qwen2VLImageProcessor.from_dict(json.loads(options))


def resized(size: Size, processor: Any) -> Size:
    """Returns the size after scaling: the sides are multiples of a merged patch, and the number of pixels is within the
    processor's limits."""
    height, width = smart_resize(
        size[1],
        size[0],
        processor.patch_size * processor.merge_size,
        processor.size["shortest_edge"],
        processor.size["longest_edge"],
    )
    return width, height


def grid(size: Size, processor: Any) -> tuple[int, int]:
    """Returns the number of rows and columns of a picture's tokens."""
    width, height = resized(size, processor)
    side = processor.patch_size * processor.merge_size
    return height // side, width // side


def picture_positions(image_slots: Sequence[bool], grids: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
    """Returns the positions of a prompt's tokens (time, row, column), [3, P] int64, and the first position after it.

    Args:
        image_slots: [P], True for the tokens of pictures. Each picture has rows * columns tokens, row by row.
        grids: (rows, columns) of each picture, in order.
    Raises: ValueError if the number of image slots is not the number of tokens in `grids`.
    """
    if (slots := sum(image_slots)) != (tokens := sum(rows * columns for rows, columns in grids)):
        raise ValueError(f"the prompt has {slots} image tokens, but its pictures take {tokens}")
    parts: list[Tensor] = []
    following, start, place = iter(grids), 0, 0
    while place < len(image_slots):
        if image_slots[place]:
            rows, columns = next(following)
            row = torch.arange(rows).repeat_interleave(columns)
            column = torch.arange(columns).repeat(rows)
            parts.append(torch.stack([torch.zeros_like(row), row, column]) + start)
            place, start = place + rows * columns, start + max(rows, columns)
        else:
            end = next((n for n in range(place, len(image_slots)) if image_slots[n]), len(image_slots))
            parts.append(torch.arange(start, start + end - place).expand(3, -1))
            place, start = end, start + end - place
    return torch.cat(parts, -1), start
