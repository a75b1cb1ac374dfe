"""Tests positions, sizes and names of Qwen's vision-language models. tests/rollout/test_comparison.py compares their
logprobs with transformers and vLLM."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.learner.batch import Group
from rl.learner.packing import pack
from rl.model import hf_folder
from rl.model.qwen_vl import grid, image_processor, picture_positions
from tests.support import qwen_vl


def test_a_picture_has_one_time_and_its_rows_and_columns_and_text_goes_on_after_the_largest_position() -> None:
    slots = [False, False, *[True] * 6, False, *[True], False]
    positions, following = picture_positions(slots, [(2, 3), (1, 1)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],  # time
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],  # row
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],  # column
    ]
    assert following == 8


def test_pictures_without_text_between_them_have_positions_of_their_own() -> None:
    positions, following = picture_positions([True] * 4, [(1, 2), (2, 1)])
    assert positions.tolist() == [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]]
    assert following == 4


def test_a_wrong_number_of_image_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="3 image tokens, but its pictures take 4"):
        picture_positions([True] * 3, [(2, 2)])


@pytest.mark.parametrize("family", qwen_vl.FAMILIES)
def test_positions_are_those_of_transformers_and_responses_continue_after_them(family: str, tmp_path: Path) -> None:
    model = qwen_vl.make(family, tmp_path)
    ours = hf_folder.load(tmp_path)
    size = (200, 100)
    rows, columns = grid(size, image_processor(ours.config))
    prompt = (9, qwen_vl.START, *[qwen_vl.IMAGE] * (rows * columns), qwen_vl.END, 10)
    group = Group(prompt, ("digest",), ((11, 12), (13,)), (0, 1), (size,))
    (row,) = pack([group], 500, ours.image_token_id, partial(ours.positions, ours.config))
    ids = torch.tensor([prompt])
    shown = torch.tensor([[1, 2 * rows, 2 * columns]])
    expected, _ = model.model.get_rope_index(ids, (ids == qwen_vl.IMAGE).int(), image_grid_thw=shown)
    assert torch.equal(row.position_ids[:, : len(prompt)], expected[:, 0])
    start = int(expected.max()) + 1
    assert row.position_ids[:, len(prompt) :].tolist() == [[start, start + 1, start]] * 3
    assert start < len(prompt)  # the picture takes fewer positions than tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", qwen_vl.FAMILIES)
def test_a_saved_folder_has_the_names_that_transformers_writes_and_loads_alike(
    family: str, tied: bool, tmp_path: Path
) -> None:
    qwen_vl.make(family, tmp_path / "source", tied=tied)
    model = hf_folder.load(tmp_path / "source")
    hf_folder.save(model, tmp_path / "saved", source=tmp_path / "source")
    assert "preprocessor" not in json.loads((tmp_path / "saved/config.json").read_text())
    if family == "qwen3_vl":
        names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("source", "saved")]
        assert names[0] - {"lm_head.weight"} == names[1] - {"lm_head.weight"}
    theirs = qwen_vl.MODELS[family].from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([qwen_vl.words(10)])
    source = qwen_vl.MODELS[family].from_pretrained(tmp_path / "source", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, source(input_ids=ids).logits)


def test_a_folder_without_the_options_of_its_image_processor_is_refused(tmp_path: Path) -> None:
    qwen_vl.make("qwen3_vl", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(hf_folder.CheckpointError, match=r"has no preprocessor_config\.json"):
        hf_folder.check(tmp_path)


def test_mixtures_of_experts_and_newer_families_are_refused_by_name(tmp_path: Path) -> None:
    qwen_vl.make("qwen3_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for kind in ("qwen3_vl_moe", "qwen3_5"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        with pytest.raises(hf_folder.CheckpointError, match=rf"'{kind}' is not supported; supported are step_robotics"):
            hf_folder.check(tmp_path)
