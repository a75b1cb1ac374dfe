"""Tests which class builds the model of a config, and the image token of each model family."""

import json

import pytest
from transformers import Qwen3Config

from rl.model import hf_folder
from rl.model.config import StepVLConfig
from rl.model.registry import family
from rl.model.step_vl import StepVL
from rl.model.text import TextModel


def test_a_config_chooses_the_class_of_its_family():
    assert family(StepVLConfig()) is StepVL
    assert family(Qwen3Config()) is TextModel


def test_only_families_that_accept_pictures_have_an_image_token():
    config = StepVLConfig()
    token = family(config).image_token(config)
    assert token is not None
    assert (token.text, token.id) == ("<im_patch>", 151679)
    assert token.expansion((224, 224)) == 171  # 169 tokens of the global view, a start token, an end token
    assert token.shown((1456, 364)) == (1456, 364) and token.shown((6048, 3024)) == (3024, 1512)
    assert family(Qwen3Config()).image_token(Qwen3Config()) is None


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(hf_folder.CheckpointError, match="'gpt2' is not supported"):
        hf_folder.load(tmp_path)
