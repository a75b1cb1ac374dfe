"""Tests which class builds the model of a config, and the image token of each model family."""

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen3Config

from rl.model import hf_folder
from rl.model.config import StepVLConfig
from rl.model.pictures import Views
from rl.model.registry import FAMILIES, family
from rl.model.step_vl import StepVL
from rl.model.text import TextModel
from tests.support import tiny
from tests.support.models import step_vl


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


class OtherConfig(StepVLConfig):
    model_type = "other_vl"

    def __init__(self, **options: Any) -> None:  # transformers would write another __init__ for a class without one
        super().__init__(**options)


class Other(StepVL):
    """A family with a processor of its own: it sees pictures upside down."""

    def views(self, picture: Image.Image) -> Views:
        return super().views(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM))


def test_a_new_family_needs_only_a_class_and_an_entry_in_the_registry(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, OtherConfig.model_type, Other)
    AutoConfig.register(OtherConfig.model_type, OtherConfig, exist_ok=True)
    hf_folder.save(step_vl(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "other_vl"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = hf_folder.load(tmp_path)
    assert isinstance(model, Other) and model.image_token_id == step_vl().image_token_id
    picture = tiny.image((56, 56))
    turned = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert torch.equal(model.features([picture])[0], step_vl().features([turned])[0])
    hf_folder.save(model, tmp_path / "saved")
    assert isinstance(hf_folder.load(tmp_path / "saved"), Other)
