"""Tests that a saved model folder loads as the same model. Also tests the errors for invalid folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.model import hf_folder
from tests.support.models import step_vl, text_model


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
    with pytest.raises(hf_folder.CheckpointError, match=r"model\.norm\.weight has shape \(5,\), but .* needs \(32,\)"):
        hf_folder.load(tmp_path)


def test_the_error_for_a_folder_without_weights_or_config_names_the_missing_file(tmp_path):
    with pytest.raises(hf_folder.CheckpointError, match=r"has no config\.json"):
        hf_folder.load(tmp_path)
    step_vl().config.save_pretrained(tmp_path)
    with pytest.raises(hf_folder.CheckpointError, match="only safetensors are read"):
        hf_folder.load(tmp_path)


def test_a_link_to_a_file_outside_of_the_folder_is_refused_before_it_could_be_copied(tmp_path):
    (tmp_path / "id_rsa").write_text("private")
    hf_folder.save(text_model(), tmp_path / "model")
    (tmp_path / "model/notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(hf_folder.CheckpointError, match=r"model/notes\.txt is a link to .*/id_rsa"):
        hf_folder.check(tmp_path / "model")
    with pytest.raises(hf_folder.CheckpointError, match=r"notes\.txt is a link"):
        hf_folder.save(text_model(), tmp_path / "saved", source=tmp_path / "model")
    assert not (tmp_path / "saved/notes.txt").exists()


def test_links_within_a_model_folder_and_to_the_blobs_of_a_hub_copy_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1"
    hf_folder.save(text_model(), snapshot)
    blobs.mkdir()
    (blobs / "1f").write_text("template")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/1f")
    (snapshot / "same.jinja").symlink_to("chat_template.jinja")
    hf_folder.check(snapshot)
    hf_folder.save(text_model(), tmp_path / "saved", source=snapshot)
    for name in ("chat_template.jinja", "same.jinja"):
        assert (tmp_path / "saved" / name).read_text() == "template" and not (tmp_path / "saved" / name).is_symlink()


@pytest.mark.parametrize("content", ["", "[]", "3", '{"model_type": 5}', '{"model_type": "step_vl", "text_config": 7}'])
def test_a_config_that_is_no_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(hf_folder.CheckpointError, match=r"config\.json"):
        hf_folder.check(tmp_path)


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrites config.json with other values."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_forms_of_configs_that_people_have_are_read_alike(tmp_path):
    hf_folder.save(step_vl(), tmp_path)
    before = hf_folder.check(tmp_path)
    change_config(
        tmp_path,
        hidden_size=before.hidden_size,
        architectures=["Step3VL10BForCausalLM"],
        auto_map={"AutoConfig": "configuration_step_vl.StepVLConfig"},
        projector_bias="false",
        tie_word_embeddings="False",
    )
    after = hf_folder.check(tmp_path)
    assert after.architectures == ["StepVLForConditionalGeneration"]
    assert (after.projector_bias, after.tie_word_embeddings) == (False, False)
    change_config(tmp_path, hidden_size=5)
    with pytest.raises(hf_folder.CheckpointError, match=r"hidden_size is 5, but text_config\.hidden_size is"):
        hf_folder.check(tmp_path)


@pytest.mark.parametrize("yarn", [None, 2.0])
@pytest.mark.parametrize("made", [step_vl, text_model])
def test_saved_positions_are_written_for_transformers_4_too(tmp_path, made, yarn):
    hf_folder.save(made(), tmp_path / "plain")
    hf_folder.save(hf_folder.load(tmp_path / "plain", yarn=yarn), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    text = saved.get("text_config", saved)
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    if yarn:
        assert text["rope_scaling"]["rope_type"] == "yarn" and text["rope_scaling"]["factor"] == 2.0
    else:
        assert text["rope_scaling"] is None
    again = hf_folder.read_config(tmp_path / "saved").get_text_config()
    assert again.rope_parameters == text["rope_parameters"]


def test_the_saved_config_names_the_dtype_of_the_saved_tensors(tmp_path):
    model = step_vl()
    model.config.dtype = torch.bfloat16
    hf_folder.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    hf_folder.save(model, tmp_path, tensors=tensors)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["dtype"] == saved["text_config"]["dtype"] == "bfloat16"


def test_python_files_of_the_source_are_kept_and_never_run(tmp_path):
    hf_folder.save(step_vl(), tmp_path / "source")
    (tmp_path / "source/configuration_step_vl.py").write_text("raise SystemExit('this code was run')")
    change_config(tmp_path / "source", auto_map={"AutoConfig": "configuration_step_vl.StepVLConfig"})
    hf_folder.save(hf_folder.load(tmp_path / "source"), tmp_path / "saved", source=tmp_path / "source")
    assert (tmp_path / "saved/configuration_step_vl.py").is_file()
    assert "auto_map" in json.loads((tmp_path / "saved/config.json").read_text())
    hf_folder.load(tmp_path / "saved")
