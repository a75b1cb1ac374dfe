"""Tests YaRN: engine, learner and the model of transformers agree at positions beyond the trained positions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from rl.model import hf_folder
from rl.model.attention import Layout, Span
from rl.model.config import overrides, positions, with_yarn
from rl.types import Request
from tests.support import tiny
from tests.support.engine_process import engine

TRAINED, FACTOR = 256, 2.0


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM]:
    """The folder of a model with only 256 trained positions, and the model itself."""
    folder = tmp_path_factory.mktemp("short")
    model = tiny.make_text_model(folder, tied=False)
    model.config.max_position_embeddings = TRAINED
    model.config.save_pretrained(folder)
    return folder, model


def extended(model: Qwen3ForCausalLM, factor: float | None = FACTOR) -> Qwen3ForCausalLM:
    """Returns a model of transformers with YaRN and with the weights of `model`. If `factor` is None, YaRN is not
    used."""
    made = Qwen3ForCausalLM(with_yarn(copy.deepcopy(model.config), factor)).float().eval()
    made.load_state_dict(model.state_dict())
    return made


@torch.no_grad()
def logprobs(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    row = torch.tensor([ids])
    every = model(input_ids=row).logits.log_softmax(-1)[0, :-1]
    return every.gather(-1, row[0, 1:, None])[:, 0]


def test_beyond_the_trained_positions_the_engine_equals_the_model(
    short: tuple[Path, Qwen3ForCausalLM],
) -> None:
    folder, model = short
    ids = tiny.word_ids(400)
    with engine(folder, yarn=FACTOR, max_sequence_length=int(TRAINED * FACTOR)) as started:
        found = torch.tensor(started.score(ids))
        (answer,) = started.generate([Request(ids, (), 8, seed=1)])
    expected = logprobs(extended(model), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - logprobs(extended(model, None), ids)).abs().max() > 0.01  # without YaRN the results differ
    whole = logprobs(extended(model), ids + answer.response_ids)[len(ids) - 1 :]
    torch.testing.assert_close(torch.tensor(answer.logprobs), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_learner_equals_the_model_and_saves_the_extension(
    short: tuple[Path, Qwen3ForCausalLM], tmp_path: Path
) -> None:
    folder, model = short
    ids = tiny.word_ids(400)
    learner = hf_folder.load(folder, yarn=FACTOR)
    row, layout = torch.tensor([ids]), Layout((Span(len(ids) - 1, (1,)),))
    hidden = learner.model(
        input_ids=row, position_ids=torch.arange(len(ids))[None], use_cache=False, layout=layout
    ).last_hidden_state[0]
    found = learner.lm_head(hidden[:-1]).log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
    torch.testing.assert_close(found, logprobs(extended(model), ids), atol=1e-4, rtol=0)

    hf_folder.save(learner, tmp_path / "saved")
    config = hf_folder.read_config(tmp_path / "saved")
    assert (positions(config), config.rope_parameters["factor"]) == (512, FACTOR)
    again = hf_folder.read_config(tmp_path / "saved", yarn=FACTOR)
    assert (positions(again), again.rope_parameters) == (512, config.rope_parameters)


def test_the_decoder_of_a_vision_language_model_is_extended(tmp_path: Path) -> None:
    tiny.make_step_vl(tmp_path)
    plain, made = hf_folder.read_config(tmp_path), hf_folder.read_config(tmp_path, yarn=2.0)
    assert (positions(plain), positions(made)) == (2048, 4096)
    assert overrides(made)["text_config"]["rope_parameters"]["factor"] == 2.0
    assert overrides(made)["text_config"]["max_position_embeddings"] == 4096


def test_positions_already_extended_by_another_method_are_refused(tmp_path: Path) -> None:
    model = tiny.make_text_model(tmp_path, tied=False)
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    with pytest.raises(ValueError, match="the positions are already extended by llama3"):
        with_yarn(model.config, 2.0)
