"""Tests that rl.run trains, evaluates, saves and resumes a user's text model with the user's data."""

import json
import os
import random
import re
import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl.model import hf_folder
from rl.model.weight_files import stored_tensors
from tests.support.command import ROOT, Command, metrics, run, samples, wait_for_iteration
from tests.support.models import randomized

WORDS = ("<eos>", "<|im_start|>", "<|im_end|>", "user", "assistant", "say", *"0123456789")
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: two JSONL files, a tokenizer, and a Qwen3 model with tied embeddings. The library transformers
    has saved the model."""
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "model")
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    randomized(Qwen3ForCausalLM(config), 3).save_pretrained(folder / "model")
    draw = random.Random(0)
    for name, count in (("train", 32), ("heldout", 8)):
        rows = [_row(f"{name}-{i}", str(draw.randrange(10))) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _row(identity: str, digit: str) -> dict[str, object]:
    messages = [{"role": "user", "content": f"say {digit}"}]
    return {"id": identity, "task": "echo", "messages": messages, "ground_truth": digit}


@pytest.fixture(scope="module")
def their_run(theirs: Path) -> Path:
    """The folder of a run with partial rollouts. The run gets SIGTERM twice in its second iteration, as from the
    program `timeout`. Then it is resumed and ends after its third iteration."""
    folder = theirs / "my_run"
    command = Command(
        "rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", "--output", "my_run",
        f"model.path={theirs}/model", f"data.train={theirs}/train.jsonl", f"data.eval={theirs}/heldout.jsonl",
        "rewards.echo={use: exact}", "iterations=2", "prompts_per_iteration=8", "rollouts_per_prompt=4",
        "max_sequence_length=24", "checkpoint.every=1",
        "rollout.partial={extra_prompts: 0.5, chunk_tokens: 2}", folder=theirs,
    )  # fmt: skip
    wait_for_iteration(folder, 1, command)
    for _ in range(2):
        os.killpg(command.process.pid, signal.SIGTERM)
    code, out, err = command.finish()
    assert (code, err) == (130, "") and re.search(rf"interrupted after iteration [12]; go on with: .* {folder}\n", out)
    assert command.left_behind() == []
    code, _, err = run("rl.run", "--resume", folder, "iterations=3")
    assert code == 0, err
    trained = hf_folder.load(folder / "policy")
    assert trained.config.tie_word_embeddings and trained.config.model_type == "qwen3"
    assert not any(name.startswith("lm_head") for name in stored_tensors(folder / "policy"))
    return folder


def test_one_command_trains_evaluates_saves_and_resumes_a_users_text_model(their_run: Path) -> None:
    lines = metrics(their_run)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert all("eval/echo" in lines[i] for i in (0, 3))
    assert max(line.get("rollout/logprob_gap", 0) for line in lines) < 1e-4


def test_unfinished_responses_are_finished_in_later_iterations_even_after_a_resume(their_run: Path) -> None:
    seen = []
    for iteration in (1, 2, 3):
        found = samples(their_run, iteration)
        pieces = [sample["pieces"] for sample in found]
        assert [sum(tokens for _, tokens in one) for one in pieces] == [sample["response_tokens"] for sample in found]
        assert all(step < iteration for one in pieces for step, _ in one)
        line = metrics(their_run)[iteration]
        assert line["response/continued_fraction"] == sum(len(one) > 1 for one in pieces) / 32
        assert (line["rollout/staleness"] > 0) == (iteration > 1)
        assert 0.9 < line["policy/tis_mean"] < 1.1
        seen += [sample["id"] for sample in found]
    assert max(line["response/continued_fraction"] for line in metrics(their_run)[2:]) > 0
    assert len(seen) == 3 * 8 * 4 and len(set(seen)) == 3 * 8  # each prompt is used once, with all 4 rollouts
