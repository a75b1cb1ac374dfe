"""Tests that no value in a config.json can crash a check, run for ever or fill the memory."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.model import config_file, hf_folder
from tests.support.models import step_vl, text_model

VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 10**30, 1e300, float("nan"), "x", "", "true", [], [1, 2], {}, {"a": 1}])
)
MORE_KEYS = [("num_labels",), ("text_config", "num_labels"), ("id2label",), ("rope_scaling",), ("auto_map",)]


def _keys(config: dict[str, Any], start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from _keys(value, (*start, key))


def _replaced(config: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Returns a copy of the config with another value of a key."""
    config = deepcopy(config)
    part = config
    for name in key[:-1]:
        part = part.setdefault(name, {})
    part[key[-1]] = value
    return config


@pytest.fixture(scope="module", params=[step_vl, text_model], ids=["step_vl", "text"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf_folder.save(request.param(), folder)
    return folder, json.loads((folder / "config.json").read_text())


@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused_by_the_name_of_the_file(folder, data):
    path, config = folder
    key = data.draw(st.sampled_from([*_keys(config), *MORE_KEYS]))
    (path / "config.json").write_text(json.dumps(_replaced(config, key, data.draw(VALUES))))
    try:
        hf_folder.check(path)
    except hf_folder.CheckpointError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("vision_config", "layers"), 2**31, r"vision_config\.layers is 2147483648; it must be from 0 to 4,096"),
        (("text_config", "num_hidden_layers"), -1, r"text_config\.num_hidden_layers is -1"),
        (("num_labels",), 2**31, "num_labels is 2147483648"),
        (("text_config", "hidden_size"), 10**30, r"hidden_size is 1e\+30, which is larger than any size"),
        (("quantization_config",), {"quant_method": "fp8"}, r"a quantized model \(fp8\).*Use the unquantized release"),
        (("text_config", "quantization_config"), {"quant_method": "bitsandbytes"}, r"quantized model \(bitsandbytes\)"),
        (
            ("model_type",),
            "qwen9",
            "'qwen9' is not supported; supported are step_robotics, qwen2_5_vl, qwen3_vl, qwen3",
        ),
    ],
)
def test_what_no_model_here_can_have_is_refused_by_name(tmp_path, key, value, message):
    hf_folder.save(step_vl(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(_replaced(config, key, value)))
    with pytest.raises(hf_folder.CheckpointError, match=message):
        hf_folder.check(tmp_path)


def test_a_quantized_folder_is_known_by_its_second_file_too(tmp_path):
    hf_folder.save(text_model(), tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(hf_folder.CheckpointError, match="quantized model"):
        hf_folder.check(tmp_path)


def test_booleans_as_strings_have_their_meaning(tmp_path):
    (tmp_path / "config.json").write_text('{"projector_bias": "False", "a": [{"b": "true"}], "c": "falsehood"}')
    assert config_file.read(tmp_path) == {"projector_bias": False, "a": [{"b": True}], "c": "falsehood"}


def test_a_huge_config_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text("[" * (config_file.MOST_BYTES + 1))
    with pytest.raises(hf_folder.CheckpointError, match="a config has at most 16,777,216"):
        config_file.read(tmp_path)
