"""StepVL and text decoders: names and shapes on disk, folders in and out, and what a bad folder says."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rl.model import hf_folder
from rl.model.config import StepVLConfig, StepVLVisionConfig
from rl.model.layout import crop_grid, picture_tokens, resized, squared
from rl.model.step_vl import rope_2d, rotate
from tests.support.models import randomized, step_vl, text_model

FULL = (728, 504, 169, 81)


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


def test_the_full_size_model_is_the_size_of_the_published_checkpoint():
    parameters = sum(p.numel() for p in hf_folder.build(StepVLConfig()).parameters())
    assert 2 * parameters == pytest.approx(20.4e9, rel=0.005)  # bytes in bfloat16


def test_view_sizes_follow_from_the_token_counts():
    config = StepVLConfig()
    assert (config.global_size, config.crop_size) == (728, 504)


def test_a_config_whose_views_and_tokens_disagree_is_refused():
    with pytest.raises(ValueError, match=r"global view of 728 pixels .*image_size is 448"):
        StepVLConfig(vision_config={"image_size": 448})


def test_an_encoder_option_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="use_cls_token is True"):
        StepVLVisionConfig(use_cls_token=True)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((224, 224), 171),  # small and square: the global view alone, with its start and end
        ((3024, 3024), 36 * 83 + 171 + 5),  # 6 x 6 crops, 5 newlines
        ((728, 728), 4 * 83 + 171 + 1),  # 728 / 504 leaves 0.44 > 0.2 over, so 2 x 2
        ((600, 300), 2 * 83 + 171),  # ratio 2: windows of the short side, one row, no newline
    ],
)
def test_pictures_take_as_many_tokens_as_the_published_code_says(size, tokens):
    assert picture_tokens(size, *FULL) == tokens


def test_thin_strips_become_squares_and_huge_pictures_shrink():
    assert squared((200, 20)) == (200, 200)
    assert squared((200, 40)) == (200, 40)
    assert resized((6048, 3024), 728) == (3024, 1512)


def test_crops_are_cut_row_by_row():
    grid = crop_grid((1008, 504), 728, 504)
    assert grid.boxes() == [(0, 0, 504, 504), (504, 0, 1008, 504)]


def test_rotary_positions_turn_the_first_half_of_a_head_with_the_column():
    cos, sin = rope_2d(8, 4, 2, 2)
    turned = rotate(torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]), cos, sin)
    # token 1 is row 0, column 1: (1, 0) in the first half turns by 1 radian, the second half stays
    angle = torch.tensor(1.0)
    torch.testing.assert_close(turned[1, :2], torch.stack((angle.cos(), angle.sin())))
    torch.testing.assert_close(turned[1, 4:6], torch.tensor([1.0, 0.0]))


def test_features_put_crops_before_the_global_view():
    model = step_vl()
    wide = Image.effect_noise((224, 112), 80).convert("RGB")  # two crops of one token, one view of four
    (features,) = model.features([wide])
    assert features.shape == (sum(model_tokens(model, wide.size)), 32)
    (alone,) = model._encode([model.views(wide).global_view])
    torch.testing.assert_close(features[-4:], alone)


def model_tokens(model, size) -> tuple[int, int]:
    grid = crop_grid(size, model.config.global_size, model.config.crop_size)
    return grid.count * model.config.patch_token_len, model.config.image_token_len


@pytest.mark.parametrize("made", [step_vl, text_model, lambda: text_model(tied=True)])
def test_a_saved_folder_loads_as_the_same_model(tmp_path, made):
    model = made()
    hf_folder.save(model, tmp_path)
    again = hf_folder.load(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == bool(model.config.tie_word_embeddings)


def test_tied_models_store_no_head(tmp_path):
    hf_folder.save(text_model(tied=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_transformers_own_folders_load_with_the_same_logits(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = torch.arange(10, 20)
    for config, cls in ((Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)):
        theirs = randomized(cls(config(**sizes, **heads, tie_word_embeddings=False)), 1)
        theirs.save_pretrained(tmp_path / config.model_type)
        ours = hf_folder.load(tmp_path / config.model_type)
        from rl.learner.batch import Group
        from rl.learner.packing import pack
        from rl.model.packed import hidden_states

        (row,) = pack([Group(tuple(ids.tolist()), (), ((1,),), (0,))], 50, None)
        got = ours.lm_head(hidden_states(ours.model, row, {}))[:10]
        torch.testing.assert_close(got, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_missing_and_unknown_tensors_are_named(tmp_path):
    hf_folder.save(step_vl(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stray.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        hf_folder.CheckpointError, match=r"1 missing tensors: model\.norm\.weight.*1 unknown tensors: stray"
    ):
        hf_folder.load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path):
    hf_folder.save(text_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(hf_folder.CheckpointError, match=r"model\.norm\.weight is \(5,\), the config asks for \(32,\)"):
        hf_folder.load(tmp_path)


def test_a_folder_without_weights_or_config_says_what_is_not_there(tmp_path):
    with pytest.raises(hf_folder.CheckpointError, match=r"has no config\.json"):
        hf_folder.load(tmp_path)
    step_vl().config.save_pretrained(tmp_path)
    with pytest.raises(hf_folder.CheckpointError, match="only safetensors are read"):
        hf_folder.load(tmp_path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(hf_folder.CheckpointError, match="'gpt2' is not built"):
        hf_folder.load(tmp_path)


def test_the_saved_config_is_step_robotics_and_needs_no_remote_code(tmp_path):
    step_vl().config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "step_robotics"
    assert saved["architectures"] == ["StepVLForConditionalGeneration"]
    assert type(hf_folder.read_config(tmp_path)) is StepVLConfig
