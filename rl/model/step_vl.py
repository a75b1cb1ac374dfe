"""STEP3-VL in plain torch: Perception Encoder, two stride-2 convolutions, linear projector, Qwen3 decoder.

Modules have the same names as the tensors on disk, so a checkpoint can be loaded without changing names. Source:
STEP3-VL-10B report (arXiv 2601.09668), section 2, and the published serving code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3Model

from rl.model.architecture import Architecture, ImageToken
from rl.model.config import StepVLConfig, StepVLVisionConfig
from rl.model.layout import Size, picture_tokens, picture_words, resized, squared
from rl.model.pictures import Views, views

ROPE_THETA = 1e4


def rope_2d(head_dim: int, grid: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the vision tower's 2-D rotary positions.

    In each head, the angles of the first half of the channels depend on the column, and the angles of the second half
    depend on the row. Neighbouring channels form pairs, and the two channels of a pair have the same frequency. `grid`
    is the maximum number of rows, and also the maximum number of columns.

    Returns: cos, sin, each [rows * columns, head_dim] float32.
    """
    if max(rows, columns) > grid:
        raise ValueError(f"a view of {rows} x {columns} patches is larger than the tower's maximum {grid} x {grid}")
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    row = (torch.arange(rows).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)
    column = (torch.arange(columns).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)
    angles = torch.cat([column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)], dim=-1).reshape(
        rows * columns, head_dim
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels of `x` [..., T, head_dim]: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """Full self-attention over the patches of each view. Inputs and outputs are [views, patches, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        q, k = rotate(q, cos, sin).to(x.dtype), rotate(k, cos, sin).to(x.dtype)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with quick GELU in between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a learned factor."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm transformer layer of the vision tower."""

    def __init__(self, config: StepVLVisionConfig) -> None:
        super().__init__()
        width, scale = config.width, config.ls_init_value
        self.attn = Attention(width, config.heads)
        self.ls_1 = LayerScale(width, scale) if scale is not None else nn.Identity()
        self.ls_2 = LayerScale(width, scale) if scale is not None else nn.Identity()
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), cos, sin))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """The layers of the vision tower. The attribute has the name `resblocks`, because the names of the tensors on disk
    contain this word."""

    def __init__(self, config: StepVLVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))


class PerceptionEncoder(nn.Module):
    """Encodes square views as tokens. The parts are a patch embedding, absolute and rotary positions, transformer
    layers and two stride-2 convolutions."""

    def __init__(self, config: StepVLVisionConfig) -> None:
        super().__init__()
        width = config.width
        self.patch_size, self.grid = config.patch_size, config.image_size // config.patch_size
        self.head_dim = width // config.heads
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width, eps=1e-5) if config.use_ln_pre else nn.Identity()
        self.ln_post = nn.LayerNorm(width, eps=1e-5) if config.use_ln_post else nn.Identity()
        self.transformer = Transformer(config)
        self.vit_downsampler1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.vit_downsampler2 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.grid**2, width))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Returns the embeddings of the absolute positions, [rows * columns, width]. For views smaller than the grid,
        the embeddings are resized bilinearly."""
        if (rows, columns) == (self.grid, self.grid):
            return self.positional_embedding
        table = self.positional_embedding.unflatten(0, (self.grid, self.grid)).permute(2, 0, 1)[None]
        table = F.interpolate(table, size=(rows, columns), mode="bilinear", align_corners=False)
        return table[0].permute(1, 2, 0).flatten(0, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encodes pixels [views, 3, side, side]. Returns [views, (side / patch_size / 4)^2, 4 * width]."""
        x = self.conv1(pixels)
        rows, columns = x.shape[-2:]
        cos, sin = (t.to(x.device) for t in rope_2d(self.head_dim, self.grid, rows, columns))
        x = self.ln_pre(x.flatten(2).transpose(1, 2) + self.positions(rows, columns))
        for block in self.transformer.resblocks:
            x = block(x, cos, sin)
        x = self.ln_post(x).transpose(1, 2).unflatten(2, (rows, columns))
        return self.vit_downsampler2(self.vit_downsampler1(x)).flatten(2).transpose(1, 2)


class StepVL(Architecture):
    """The STEP3-VL model: vision tower, projector, decoder and head. Attributes have the same names as the tensors on
    disk."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]] = {
        "encoder": ("vision_model.",),
        "projector": ("vit_large_projector.",),
    }

    def __init__(self, config: StepVLConfig) -> None:
        super().__init__(config)
        text, width = config.text_config, config.vision_config.width
        self.vision_model = PerceptionEncoder(config.vision_config)
        self.vit_large_projector = nn.Linear(4 * width, text.hidden_size, bias=config.projector_bias)
        self.model = Qwen3Model(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def image_token(cls, config: Any) -> ImageToken:
        sizes = config.global_size, config.crop_size, config.image_token_len, config.patch_token_len

        def expansion(size: Size) -> int:
            return picture_tokens(size, *sizes)

        def words(size: Size) -> list[str]:
            return picture_words(size, *sizes)

        def shown(size: Size) -> Size:
            return resized(squared(size), config.global_size)

        return ImageToken("<im_patch>", "<im_patch>", config.image_token_id, expansion, words, shown)

    def views(self, picture: Image.Image) -> Views:
        """Returns the global view and the crops of a picture."""
        return views(picture, self.config.global_size, self.config.crop_size)

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Returns the features of each picture, [image tokens, hidden]. In each tensor, the features of the crops come
        first, then the features of the global view."""
        all_views = [self.views(p) for p in pictures]
        global_views = self._encode([v.global_view for v in all_views])
        crops = self._encode([crop for v in all_views for crop in v.crops])
        result = []
        for v, global_view in zip(all_views, global_views, strict=True):
            own_crops, crops = crops[: len(v.crops)], crops[len(v.crops) :]
            result.append(torch.cat([*own_crops, global_view]))
        return result

    def _encode(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        if not pixels:
            return []
        weight = self.vit_large_projector.weight
        batch = torch.stack(list(pixels)).to(weight.device, weight.dtype)
        return list(self.vit_large_projector(self.vision_model(batch)))
