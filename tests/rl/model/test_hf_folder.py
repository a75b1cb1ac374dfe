"""Tests that a saved model folder loads as the same model. Also tests the errors for invalid folders."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rl.model import hf_folder
from tests.support.models import step_vl, text_model

JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["weight_map", "lm_head.weight", "a"]), inner, max_size=3)
    ),
)
FULL = (728, 504, 169, 81)


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


@given(content=JSON.map(json.dumps) | JSON.map(lambda value: json.dumps({"weight_map": value})) | st.text(max_size=20))
def test_an_index_with_any_content_gives_an_error_that_names_it(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "model.safetensors.index.json").write_text(content)
    try:
        assert hf_folder.tensor_files(folder) == {}
    except hf_folder.CheckpointError as error:
        assert "model.safetensors.index.json" in str(error)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "absent.safetensors", "model.bin"])
def test_an_index_cannot_name_files_outside_of_the_folder_or_absent_ones(tmp_path, file):
    hf_folder.save(text_model(), tmp_path / "model")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(hf_folder.CheckpointError, match="which the folder does not have"):
        hf_folder.check(tmp_path / "model")


@pytest.mark.parametrize("content", ["", "[]", "3", '{"model_type": 5}', '{"model_type": "step_vl", "text_config": 7}'])
def test_a_config_that_is_no_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(hf_folder.CheckpointError, match=r"config\.json"):
        hf_folder.check(tmp_path)
