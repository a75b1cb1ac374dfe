"""Tests the reward `reward_model`: the score that a classifier gives to question and answer."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from rewards import Score, get
from rl.types import Prompt, Rollout
from tests.support.reward_samples import HOSTILE_TEXTS
from tests.support.tiny import make_text_model, randomize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Qwen3 classifier with one label, a vocabulary of forty words and a simple chat template."""
    folder = tmp_path_factory.mktemp("reward_model")
    make_text_model(folder, tied=True)
    _save_classifier(folder, folder, labels=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}w0 {{ m.content }} <eos> {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def _save_classifier(source: Path, target: Path, labels: int) -> None:
    config = Qwen3Config.from_pretrained(source, num_labels=labels)
    model = Qwen3ForSequenceClassification(config).float().eval()
    randomize(model, seed=1)
    model.save_pretrained(target)


def answered(text: str) -> Rollout:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}
    return Rollout(Prompt("row-1", "t", (message,)), text)


def test_the_value_is_the_sigmoid_of_the_models_score_of_question_and_answer(folder: Path) -> None:
    found = get("reward_model", {"path": str(folder)})(answered("<think>w9</think>w3 w4"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w0 w1 w2 <eos> w0 w3 w4 <eos>", return_tensors="pt").input_ids
    model: Any = Qwen3ForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        raw = model(ids).logits.item()
    assert isinstance(found, Score)
    assert found.details == {"score": pytest.approx(raw, rel=1e-4), "tokens": 8}
    assert found.value == pytest.approx(torch.tensor(raw).sigmoid().item(), rel=1e-4)


def test_scores_without_sigmoid_are_clipped_to_zero_and_one(folder: Path) -> None:
    bound = get("reward_model", {"path": str(folder), "squash": "none"})
    found = [bound(answered(f"w{i}")) for i in range(20)]
    assert all(f.value == min(1.0, max(0.0, f.details["score"])) for f in found)
    assert len({f.details["score"] for f in found}) == 20


def test_a_long_chat_loses_its_beginning(folder: Path) -> None:
    bound = get("reward_model", {"path": str(folder), "max_length": 3})
    long, short = bound(answered("w5 " * 100 + "w6 w7")), bound(answered("w6 w7"))
    assert long.details == short.details
    assert long.details["tokens"] == 3  # the tokens w6, w7 and <eos>


def test_an_answer_can_not_close_its_turn(folder: Path) -> None:
    bound = get("reward_model", {"path": str(folder)})
    assert bound(answered("w3 <eos> w0 w4")) == bound(answered("w3 w0 w4"))


def test_an_empty_answer_scores_zero(folder: Path) -> None:
    assert get("reward_model", {"path": str(folder)})(answered("<think>w3")).value == 0.0


def test_a_folder_that_is_no_reward_model_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            _ = get("reward_model", {"path": str(path)}).scorer

    refused(tmp_path / "absent", "not a Hugging Face model folder")
    plain = tmp_path / "plain"
    make_text_model(plain, tied=True)
    refused(plain, "has 2 labels")
    _save_classifier(folder, plain, labels=1)
    refused(plain, "no chat template")
    headless = tmp_path / "headless"
    make_text_model(headless, tied=True)
    Qwen3Config.from_pretrained(headless, num_labels=1).save_pretrained(headless)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(headless)
    refused(headless, "no weights for score")


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_is_cut_to_max_length_and_scored_within_five_seconds(folder: Path, text: str) -> None:
    bound = get("reward_model", {"path": str(folder), "max_length": 256})
    _ = bound.scorer
    start = time.process_time()
    found = bound(answered(text))
    assert 0.0 <= found.value <= 1.0
    assert found.details.get("tokens", 0) <= 256
    assert time.process_time() - start < 5.0
