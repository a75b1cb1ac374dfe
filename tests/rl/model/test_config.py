"""Tests the STEP3-VL configuration: the computed sizes of views, and the configs that are refused."""

import json

import pytest

from rl.model import hf_folder
from rl.model.config import StepVLConfig, StepVLVisionConfig
from tests.support.models import step_vl


def test_view_sizes_follow_from_the_token_counts():
    config = StepVLConfig()
    assert (config.global_size, config.crop_size) == (728, 504)


def test_a_config_with_inconsistent_view_size_and_token_count_is_refused():
    with pytest.raises(ValueError, match=r"global view of 728 pixels .*image_size is 448"):
        StepVLConfig(vision_config={"image_size": 448})


def test_an_encoder_option_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="use_cls_token is True"):
        StepVLVisionConfig(use_cls_token=True)


def test_the_saved_config_is_step_robotics_and_needs_no_remote_code(tmp_path):
    step_vl().config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "step_robotics"
    assert saved["architectures"] == ["StepVLForConditionalGeneration"]
    assert type(hf_folder.read_config(tmp_path)) is StepVLConfig
