"""Tests that tensors are found in every form of folder, and that damaged files are named."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl.model import hf_folder
from rl.model.config_file import CheckpointError
from rl.model.weight_files import (
    INDEX,
    WEIGHTS,
    published_name,
    read_tensor,
    read_tensors,
    save_tensors,
    stored_tensors,
)
from tests.support.models import step_vl, text_model, transformers_name

JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["weight_map", "lm_head.weight", "a"]), inner, max_size=3)
    ),
)


def shards(folder: Path, count: int, *, index: bool) -> None:
    """Splits a folder's model.safetensors into shards."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files: dict[str, dict[str, Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        files.setdefault(f"model-{number % count + 1:05d}-of-{count:05d}.safetensors", {})[name] = tensor
    for file, part in files.items():
        save_file(part, folder / file)
    if index:
        names = {name: file for file, part in files.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_folder.save(step_vl(), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.vision_model.conv1.weight", "vision_model.conv1.weight"),
        ("model.vit_large_projector.weight", "vit_large_projector.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("value_head.weight", "value_head.weight"),
    ],
)
def test_names_become_the_published_names(name: str, published: str) -> None:
    assert published_name(name) == published


@pytest.mark.parametrize("form", ["one file", "shards", "shards without index", "names of transformers", "extras"])
def test_every_form_of_folder_has_the_same_tensors(folder: Path, form: str) -> None:
    expected = dict(read_tensors(folder))
    if form.startswith("shards"):
        shards(folder, 3, index=form == "shards")
    if form == "names of transformers":
        save_file({transformers_name(name): tensor for name, tensor in expected.items()}, folder / WEIGHTS)
    if form == "extras":
        save_file(expected | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / WEIGHTS)
    found = dict(read_tensors(folder))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    hf_folder.load(folder)
    assert torch.equal(read_tensor(folder, "model.norm.weight"), expected["model.norm.weight"])


def test_a_missing_shard_without_an_index_is_named_by_its_number(folder: Path) -> None:
    shards(folder, 3, index=False)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model-00002-of-00003\.safetensors; 1 of 3 shards are missing"):
        hf_folder.check(folder)


def test_a_file_name_with_a_huge_number_of_shards_costs_no_memory(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-1-of-99999999999999.safetensors")
    with pytest.raises(CheckpointError, match="shards are missing"):
        hf_folder.check(folder)


def test_a_missing_shard_of_an_index_is_named(folder: Path) -> None:
    shards(folder, 3, index=True)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the file 'model-00003-of-00003\.safetensors', which the"):
        hf_folder.check(folder)


def test_a_cut_file_is_named(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no complete safetensors file .*download it"):
        hf_folder.check(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
    with pytest.raises(CheckpointError, match=rf"{name} is only a pointer of Git LFS; run `git lfs pull`"):
        hf_folder.check(folder)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "qweight", "absmax", "weight_scale", "SCB"])
def test_quantized_tensors_are_refused_by_that_word(folder: Path, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    save_file(dict(read_tensors(folder)) | {name: torch.ones(4)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"contains a quantized model .*Use the unquantized release"):
        hf_folder.check(folder)


def test_a_tensor_that_two_files_have_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight twice, in model-1\.safetensors and model-2"):
        hf_folder.check(folder)


def test_an_adapter_beside_the_model_is_ignored_and_an_adapter_alone_is_named(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    hf_folder.check(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only an adapter \(adapter_model\.safetensors\); merge it"):
        hf_folder.check(folder)


def test_a_folder_in_place_of_the_weights_is_no_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        hf_folder.check(folder)


def test_saved_files_have_the_usual_access_rights(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(1)}, tmp_path)
    (tmp_path / "usual").touch()
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == [WEIGHTS, "usual"]


@given(content=JSON.map(json.dumps) | JSON.map(lambda value: json.dumps({"weight_map": value})) | st.text(max_size=20))
def test_an_index_with_any_content_gives_an_error_that_names_it(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "model.safetensors.index.json").write_text(content)
    try:
        assert stored_tensors(folder) == {}
    except CheckpointError as error:
        assert "model.safetensors.index.json" in str(error)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "absent.safetensors", "model.bin"])
def test_an_index_cannot_name_files_outside_of_the_folder_or_absent_ones(tmp_path, file):
    hf_folder.save(text_model(), tmp_path / "model")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="which the folder does not have"):
        hf_folder.check(tmp_path / "model")
