"""Tests StepVL: published tensor names and shapes, rotary positions, and the order of a picture's features."""

import pytest
import torch
from PIL import Image

from rl.model import hf_folder
from rl.model.config import StepVLConfig
from rl.model.layout import crop_grid
from rl.model.step_vl import rope_2d, rotate
from tests.support.models import step_vl


def test_the_full_size_config_has_the_published_tensor_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in hf_folder.build(StepVLConfig()).state_dict().items()}
    assert shapes["vision_model.conv1.weight"] == (1536, 3, 14, 14)
    assert shapes["vision_model.positional_embedding"] == (2704, 1536)
    assert shapes["vision_model.ln_pre.bias"] == (1536,)
    block = "vision_model.transformer.resblocks.46."
    assert shapes[block + "attn.in_proj_weight"] == (4608, 1536)
    assert shapes[block + "attn.in_proj_bias"] == (4608,)
    assert shapes[block + "attn.out_proj.weight"] == (1536, 1536)
    assert shapes[block + "ls_2.gamma"] == (1536,)
    assert shapes[block + "mlp.c_fc.weight"] == (8960, 1536)
    assert shapes[block + "mlp.c_proj.bias"] == (1536,)
    assert "vision_model.transformer.resblocks.47.ln_1.weight" not in shapes
    assert shapes["vision_model.vit_downsampler1.weight"] == (3072, 1536, 3, 3)
    assert shapes["vision_model.vit_downsampler2.bias"] == (6144,)
    assert shapes["vit_large_projector.weight"] == (4096, 6144)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (151936, 4096)
    assert shapes["model.layers.35.self_attn.k_norm.weight"] == (128,)
    assert shapes["model.layers.35.mlp.gate_proj.weight"] == (12288, 4096)
    assert shapes["model.norm.weight"] == (4096,)
    assert not any(name.endswith("q_proj.bias") or "ln_post" in name for name in shapes)


def test_the_full_size_model_has_the_size_of_the_published_checkpoint():
    parameters = sum(p.numel() for p in hf_folder.build(StepVLConfig()).parameters())
    assert 2 * parameters == pytest.approx(20.4e9, rel=0.005)  # 2 bytes per parameter in bfloat16


def test_the_column_rotates_the_first_half_of_a_heads_channels():
    cos, sin = rope_2d(8, 4, 2, 2)
    turned = rotate(torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]), cos, sin)
    # Token 1 is in row 0 and column 1. So the first half of the channels is rotated by 1 radian, and the second half is
    # unchanged.
    angle = torch.tensor(1.0)
    torch.testing.assert_close(turned[1, :2], torch.stack((angle.cos(), angle.sin())))
    torch.testing.assert_close(turned[1, 4:6], torch.tensor([1.0, 0.0]))


def test_features_put_crops_before_the_global_view():
    model = step_vl()
    wide = Image.effect_noise((224, 112), 80).convert("RGB")  # 8 crops of 1 token each, and a global view of 4 tokens
    (features,) = model.features([wide])
    assert features.shape == (sum(model_tokens(model, wide.size)), 32)
    (alone,) = model._encode([model.views(wide).global_view])
    torch.testing.assert_close(features[-4:], alone)


def model_tokens(model, size) -> tuple[int, int]:
    grid = crop_grid(size, model.config.global_size, model.config.crop_size)
    return grid.count * model.config.patch_token_len, model.config.image_token_len
