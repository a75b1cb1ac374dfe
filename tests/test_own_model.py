"""A stranger's text model and data, from outside the repository: trained, evaluated, saved, resumed by one command."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl.model import checkpoint
from tests.command import ROOT, metrics, run
from tests.models import randomized

WORDS = ("<eos>", "<|im_start|>", "<|im_end|>", "user", "assistant", "say", *"0123456789")
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tied Qwen3 that transformers itself saved, its tokenizer, and two JSONL files."""
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


def test_one_command_trains_evaluates_saves_and_resumes_a_strangers_text_model(theirs: Path) -> None:
    code, _, err = run(
        "rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", "--output", "my_run",
        f"model.path={theirs}/model", f"data.train={theirs}/train.jsonl", f"data.eval={theirs}/heldout.jsonl",
        "rewards.echo={use: exact}", "iterations=2", "prompts_per_iteration=8", "rollouts_per_prompt=4",
        "max_sequence_length=24", "checkpoint.every=1", "rollout.workers=2", folder=theirs,
    )  # fmt: skip
    assert code == 0, err
    folder = theirs / "my_run"
    assert all("eval/echo" in metrics(folder)[i] for i in (0, 2))
    assert max(m.get("rollout/logprob_gap", 0) for m in metrics(folder)) < 1e-4
    trained = checkpoint.load(folder / "policy")
    assert trained.config.tie_word_embeddings and trained.config.model_type == "qwen3"
    assert not any(name.startswith("lm_head") for name in checkpoint.tensor_files(folder / "policy"))
    code, _, err = run("rl.run", "--resume", folder, "iterations=3")
    assert code == 0, err
    assert [m["iteration"] for m in metrics(folder)] == [0, 1, 2, 3]
