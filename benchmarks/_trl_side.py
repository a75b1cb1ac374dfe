"""Runs TRL's side of benchmarks.iteration in a separate process: `python -m benchmarks._trl_side FOLDER`.

Before this program starts, `iteration.make` has written the model and the prompts to FOLDER. This program writes its
results to FOLDER/trl.json. This file itself has no test, because the project's environment does not contain TRL. The
registration of the benchmark iteration/trl is tested in tests/benchmarks/test_harness.py.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.iteration import (
    BETAS,
    GROUP,
    LEARNING_RATE,
    LIMIT,
    MEASURED,
    PROMPTS,
    THREADS,
    WARM_UP,
    share_of_even,
)

os.environ["OMP_NUM_THREADS"] = str(THREADS)  # torch reads this variable when torch is imported

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, __version__  # pyrefly: ignore[missing-import] (our environment does not install TRL)


class Stopwatch(TrainerCallback):
    """Measures how many seconds each step takes. In a step, the trainer generates responses, scores them and updates
    the weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)


def main(folder: Path) -> None:
    torch.set_num_threads(THREADS)
    lengths: list[int] = []

    def even_words(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [share_of_even(message["content"]) for (message,) in completions]

    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    stopwatch = Stopwatch()
    GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=even_words,
        args=settings(folder),
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
        callbacks=[stopwatch],
    ).train()
    result = {"seconds": stopwatch.seconds, "lengths": lengths, "version": __version__}
    (folder / "trl.json").write_text(json.dumps(result))


def settings(folder: Path) -> Any:
    """Returns TRL's settings. A step generates the whole batch and makes one optimizer step.

    Responses are generated with the default generation of transformers, which is the fastest mode that works on a CPU.
    TRL's continuous batching took twice as long as this mode, and a static cache took 20% longer. TRL's vLLM mode fails
    at the first weight update, because vLLM has repacked the weights for the CPU. The update is compiled, so it is
    faster from the second step on. Features that would make a step slower are switched off.
    """
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=WARM_UP + MEASURED,
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=LIMIT,
        shuffle_dataset=False,
        num_iterations=1,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        torch_compile=shutil.which("g++") is not None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
