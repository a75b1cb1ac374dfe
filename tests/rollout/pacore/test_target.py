"""Tests the arguments of a model's server. tests/rollout/test_generate.py starts such a server."""

import json

import pytest

from rollout.pacore.target import serve_options
from tests.support.command import ROOT

MODEL = ROOT / "recipes/scale/model"


def test_sequences_beyond_the_trained_positions_need_yarn() -> None:
    with pytest.raises(ValueError, match=r"--max-length 8192 is more than the 4096 positions .* with --yarn 2"):
        serve_options(MODEL, 8192, None, {})
    options = serve_options(MODEL, 8192, 2.0, {"seed": "1"})
    assert options["max-model-len"] == 8192 and options["seed"] == "1"
    assert json.loads(str(options["hf-overrides"]))["text_config"]["rope_parameters"]["factor"] == 2.0
