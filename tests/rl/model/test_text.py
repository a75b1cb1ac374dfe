"""Tests that text decoders compute the same logits as transformers' own classes, and refuse pictures."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from rl.learner.batch import Group
from rl.learner.packing import pack
from rl.model import hf_folder
from rl.model.packed import hidden_states
from tests.support.models import TEXT, randomized, text_model


def test_folders_saved_by_transformers_load_with_the_same_logits(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = torch.arange(10, 20)
    options: dict[str, Any] = {"tie_word_embeddings": False, "sliding_window": None, "pad_token_id": 0}
    for config, cls in (
        (Qwen2Config, Qwen2ForCausalLM),
        (LlamaConfig, LlamaForCausalLM),
        (MistralConfig, MistralForCausalLM),
        (Phi3Config, Phi3ForCausalLM),
    ):
        theirs = randomized(cls(config(**sizes, **heads, **options)), 1)
        theirs.save_pretrained(tmp_path / config.model_type)
        ours = hf_folder.load(tmp_path / config.model_type)
        (row,) = pack([Group(tuple(ids.tolist()), (), ((1,),), (0,))], 50, None)
        got = ours.lm_head(hidden_states(ours.model, row, {}))[:10]
        torch.testing.assert_close(got, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_window_that_no_sequence_can_exceed_is_allowed():
    sizes: dict[str, Any] = TEXT | {"sliding_window": TEXT["max_position_embeddings"]}
    hf_folder.build(MistralConfig(**sizes))


def test_a_text_model_refuses_pictures():
    model = text_model()
    assert model.features([]) == [] and model.image_token_id is None
    with pytest.raises(ValueError, match="qwen3 is a text model, but a prompt shows pictures"):
        model.features([Image.new("RGB", (8, 8))])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "packed groups need full attention in every layer"),
        ({"attention_bias": True}, "vLLM's Qwen3 has no bias in its output projection"),
    ],
)
def test_decoders_that_packed_rows_do_not_support_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        hf_folder.build(Qwen3Config(**TEXT, **option))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"sliding_window": 16}, "sliding_window is 16.*set it to null"), ({"resid_pdrop": 0.1}, r"resid_pdrop is 0\.1")],
)
def test_windows_and_dropouts_of_other_families_are_refused(option, message):
    sizes: dict[str, Any] = {**TEXT, "pad_token_id": 0, **option}
    with pytest.raises(ValueError, match=message):
        hf_folder.build(Phi3Config(**sizes))
