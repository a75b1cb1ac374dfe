"""Tests that positions which transformers and vLLM compute differently are refused."""

import math
from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config, Qwen3Config

from rl.model import hf_folder
from rl.model.config import with_yarn
from rl.model.rope import check_rope, transformers_temperature, vllm_temperature
from tests.support.models import TEXT

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
USUAL = 0.1 * math.log(4) + 1


@pytest.mark.parametrize(
    ("options", "learner", "engine"),
    [
        ({}, USUAL, USUAL),
        ({"attention_factor": 1.0}, 1.0, USUAL),
        ({"attention_factor": 1.0, "attn_factor": 1.0, "apply_yarn_scaling": False}, 1.0, 1.0),
        ({"attn_factor": 2.0}, USUAL, 2 * USUAL),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / USUAL, USUAL),
        ({"factor": 1.0}, 1.0, 1.0),
    ],
)
def test_the_temperature_of_yarn_in_both_libraries(options: dict[str, float], learner: float, engine: float) -> None:
    rope = YARN | options
    assert transformers_temperature(rope) == pytest.approx(learner)
    assert vllm_temperature(rope) == pytest.approx(engine)
    if math.isclose(learner, engine):
        check_rope(rope)
    else:
        with pytest.raises(ValueError, match=r"attention temperature is .* in transformers, but .* in vLLM; set"):
            check_rope(rope)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_type 'dynamic' is not supported"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
    ],
)
def test_a_model_with_other_positions_in_vllm_is_not_built(rope: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_folder.build(LlamaConfig(**TEXT, rope_parameters=rope))


def test_yarn_cannot_replace_yarn_of_another_temperature() -> None:
    with pytest.raises(ValueError, match=r"an attention temperature of 1\.13863, but model\.yarn uses 1"):
        with_yarn(Qwen3Config(**TEXT, rope_parameters=YARN), 2.0)
    again = with_yarn(with_yarn(Qwen3Config(**TEXT), 2.0), 4.0)
    assert again.max_position_embeddings == 4 * TEXT["max_position_embeddings"]


def test_yarn_is_refused_for_phi_3() -> None:
    sizes: dict[str, Any] = TEXT | {"pad_token_id": 0}
    with pytest.raises(ValueError, match=r"model\.yarn cannot extend a Phi-3 model"):
        with_yarn(Phi3Config(**sizes), 2.0)
