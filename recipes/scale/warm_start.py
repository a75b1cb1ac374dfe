"""Supervised warm start of the scale model: trains it from random weights until its answers are of medium quality.

    python -m recipes.scale.warm_start --out runs/scale

Training has three parts. First, the vision tower and the projector learn to recognise things and their places in
pictures. Then both are frozen, and the decoder learns to answer like the two writers of writers.py. Last, the decoder
learns to answer prompts that contain pooled answers. The results are OUT/model (a Hugging Face folder; model/ beside
this file was made this way) and OUT/report.json. After an interruption the same command continues from
OUT/state.safetensors.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoTokenizer

import rewards
from recipes.scale import practice, tokenizer, world
from recipes.scale.practice import Prompter
from recipes.scale.world import Problem
from recipes.scale.writers import ROUGH_OPENING, rough_share
from rl.model import attention, hf_folder
from rl.model.config import StepVLConfig, register
from rl.model.step_vl import StepVL
from rl.types import SYNTHESIS_TEMPLATE, Prompt, Rollout

REWARDS: dict[str, tuple[str, dict[str, Any]]] = {  # the same rewards as in recipes/rlvr.yaml
    "pointing": ("point_distance", {}),
    "grounding": ("iou", {"power": 1}),
    "counting": ("exact", {}),
    "arithmetic": ("math_verify", {}),
    "worksheet": ("exact", {}),
}
# The goal of the warm start for each task: the mean reward of greedy responses to held-out problems is in this range.
# RL needs this range: some responses must get a reward, and the mean reward must still be able to grow.
READY = (0.2, 0.6)
VISION_PREFIXES = ("vision_model.", "vit_large_projector.")
PEAK_LR, WARM_UP, BETAS = 2e-3, 50, (0.9, 0.98)
PICTURES = 8  # scenes per step; the number of other problems is a multiple of this number
HORIZON = 3000  # after this number of decoder steps, the learning rate would be almost 0; training ends earlier
LAST = 400  # number of steps directly before the part with messages; in these steps, most demonstrations are rough
# Contents of a batch in the part with messages: the number of scenes without messages, of worksheets without messages,
# and of problems with messages (per task).
PLAIN, SHEETS, WITH_MESSAGES = 3, 10, 4


def config(words: Any) -> StepVLConfig:
    """Returns the config of a model with 1.4 million parameters. A view has 224 x 224 pixels and 16 tokens, a crop has
    168 x 168 pixels and 9 tokens."""
    ids = words.convert_tokens_to_ids
    ends = [ids("<|endoftext|>"), ids("<|im_end|>"), ids("<im_patch>")]  # includes the image token, as in STEP3-VL-10B
    vision = {"image_size": 224, "patch_size": 14, "width": 64, "layers": 2, "heads": 4, "mlp_ratio": 4.0}
    text = {
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "initializer_range": 0.05,
        "bos_token_id": ends[0],
        "eos_token_id": ends,
        "pad_token_id": ends[0],
    }
    return StepVLConfig(
        vision_config=vision | {"ls_init_value": 1.0},
        text_config=text,
        image_token_id=ids("<im_patch>"),
        image_token_len=16,
        patch_token_len=9,
    )


def new_model(words: Any, seed: int) -> StepVL:
    """Returns a model with random weights. Only the position embeddings are not random: they are 2-D sines and cosines.
    With random position embeddings, the model soon learns the format of answers, but learns nothing about places for a
    long time."""
    torch.manual_seed(seed)
    model = StepVL(config(words))
    model.model.set_attn_implementation(attention.NAME)
    table = model.vision_model.positional_embedding
    with torch.no_grad():
        table.copy_(_sines(model.vision_model.grid, table.shape[1]))
    return model


def _sines(grid: int, width: int) -> Tensor:
    """Returns position embeddings [grid * grid, width]. Half of the channels encode the row, and the other half encode
    the column."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)
    return 0.5 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def decoder_optimizer(model: StepVL) -> AdamW:
    """Returns a new optimizer of all parameters except those of the vision tower and the projector."""
    decoder = [p for name, p in model.named_parameters() if not name.startswith(VISION_PREFIXES)]
    return AdamW(decoder, betas=BETAS, weight_decay=0.0)


def update(optimizer: AdamW, loss: Tensor, rate: float) -> None:
    """Makes one optimizer step with the learning rate `rate`. Gradients are clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


@dataclass(frozen=True)
class TrainingSteps:
    """The number of optimizer steps in each part of the training, and the seed. The state file stores these fields by
    name."""

    eyes: int  # training steps of the vision tower and the projector
    words: int  # training steps of the decoder on prompts without pooled answers
    messages: int  # training steps of the decoder when some prompts contain pooled answers
    seed: int

    @property
    def alone(self) -> int:
        """Number of steps of the first two parts. The prompts of these parts contain no pooled answers."""
        return self.eyes + self.words

    @property
    def steps(self) -> int:
        return self.alone + self.messages

    def part(self, step: int) -> str:
        """Returns the name of the part that a step (counted from 0) belongs to."""
        return "eyes" if step < self.eyes else "words" if step < self.alone else "messages"


class Trainer:
    """Trains the model with one optimizer for each part of the model. The data of a step depend only on the seed and
    the number of the step, so training can resume at any step."""

    def __init__(self, folder: Path, plan: TrainingSteps) -> None:
        self.folder, self.plan, self.step = folder, plan, 0
        register()  # AutoTokenizer reads config.json in the same folder
        tokenizer.save(folder / "model")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
        self.model = new_model(self.tokenizer, plan.seed)
        self.head = practice.SightHead(self.model, self.tokenizer)  # for the first part only; not saved with the model
        self.prompter = Prompter(self.tokenizer, self.model.config.image_token_len)
        sight = [p for name, p in self.model.named_parameters() if name.startswith(VISION_PREFIXES)]
        self.vision_optimizer = AdamW([*sight, *self.head.parameters()], betas=BETAS, weight_decay=0.0)
        self.decoder_optimizer = decoder_optimizer(self.model)
        if self.state_file.exists():
            self._resume()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    def train_step(self) -> float:
        """Makes one optimizer step and returns its loss."""
        plan, rng = self.plan, np.random.default_rng([self.plan.seed, self.step])
        part = plan.part(self.step)
        first = {"eyes": 0, "words": plan.eyes, "messages": plan.alone}[part]
        done = (self.step - first) / {"eyes": plan.eyes, "words": HORIZON, "messages": plan.messages}[part]
        if self.step == plan.alone:
            self.decoder_optimizer = decoder_optimizer(self.model)  # drops the moments of the previous part
        if part == "eyes":
            loss = practice.sight_loss(self.model, self.head, practice.draw_pictures(rng, PICTURES))
        else:
            loss = practice.loss(self.model, self.prompter, self._draw_batch(part, rng, done))
        optimizer = self.vision_optimizer if part == "eyes" else self.decoder_optimizer
        rate = PEAK_LR * min(1, (self.step - first + 1) / WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        update(optimizer, loss, rate)
        self.step += 1
        return float(loss.detach())

    def _draw_batch(self, part: str, rng: np.random.Generator, done: float) -> practice.Demonstrations:
        if part == "messages":
            plain = practice.draw_demonstrations(rng, PLAIN, things_per_scene(1), rough_share, SHEETS)
            shown = practice.draw_synthesis_demonstrations(rng, WITH_MESSAGES)
            return practice.Demonstrations(plain.problems + shown.problems, plain.responses + shown.responses)
        share = rough_share if self.step >= self.plan.alone - LAST else both_writers
        return practice.draw_demonstrations(rng, PICTURES, things_per_scene(done), share, PICTURES)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {**dict(self.model.named_parameters(prefix="model")), **dict(self.head.named_parameters(prefix="head"))}

    def save_state(self) -> None:
        """Writes weights, optimizer moments and step to one file, which replaces the old file atomically."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters().items():
            tensors[name] = parameter.detach()
            moments = self.vision_optimizer.state.get(parameter) or self.decoder_optimizer.state.get(parameter) or {}
            tensors |= {f"{key}:{name}": value for key, value in moments.items()}
        position = {"step": self.step, **asdict(self.plan)}
        partial = self.state_file.with_suffix(".partial")
        save_file(tensors, partial, metadata={key: str(value) for key, value in position.items()})
        os.replace(partial, self.state_file)

    def _resume(self) -> None:
        with safe_open(self.state_file, "pt") as file:
            position = {key: int(value) for key, value in file.metadata().items() if key != "format"}
            self.step = position.pop("step")
            if position != asdict(self.plan):
                raise SystemExit(
                    f"{self.state_file} was started with {position}, not {asdict(self.plan)}: "
                    "use the same values, or another --out"
                )
            kept = set(file.keys())
            for name, parameter in self._parameters().items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(name))
                if f"step:{name}" in kept:
                    of_vision = name.startswith((*(f"model.{prefix}" for prefix in VISION_PREFIXES), "head."))
                    optimizer = self.vision_optimizer if of_vision else self.decoder_optimizer
                    optimizer.state[parameter] = {
                        k: file.get_tensor(f"{k}:{name}") for k in ("step", "exp_avg", "exp_avg_sq")
                    }

    def save_model(self) -> None:
        save(self.model, self.folder / "model", templates={SYNTHESIS_TEMPLATE: practice.TEMPLATE.read_text()})


def save(model: StepVL, folder: Path, templates: Mapping[str, str] = MappingProxyType({})) -> None:
    """Saves the model into `folder`, which already has the tokenizer. `templates` are further files: name -> text."""
    hf_folder.save(model, folder, templates=templates)
    text = model.config.text_config
    generation = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}, indent=2) + "\n")


def things_per_scene(done: float) -> tuple[int, int]:
    """Returns the minimum and maximum number of things per scene. At first a scene has one thing, so that the model
    learns to read places. Later a scene has two or three things, so that the model must read the question."""
    return (1, 1) if done < 0.03 else (2, 3)


def both_writers(problem: Problem) -> float:
    """Returns the probability that the rough writer answers a problem. Most of the decoder's training uses this
    probability."""
    return 0.4


def score(problem: Problem, text: str) -> float:
    """Returns the reward that RL would give to this response."""
    prompt = Prompt("warm-start", problem.task, (), ground_truth=problem.truth)
    given = rewards.get(*REWARDS[problem.task])(Rollout(prompt, text))
    return given.value if isinstance(given, rewards.Score) else float(given)


def report(
    model: StepVL, prompter: Prompter, problems: Sequence[Problem], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Returns four numbers for each task. The first number is the mean reward of greedy responses. The other three are
    about responses at temperature 1: the share of rough responses, the mean reward of rough responses, and the mean
    reward of exact responses."""
    greedy = practice.answers(model, prompter, problems)
    sampled = practice.answers(model, prompter, problems, generator=torch.Generator().manual_seed(seed))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for problem, first, second in zip(problems, greedy, sampled, strict=True):
        rough = second.startswith(ROUGH_OPENING)
        found[problem.task]["greedy"].append(score(problem, first))
        found[problem.task]["rough share"].append(rough)
        found[problem.task]["rough" if rough else "exact"].append(score(problem, second))
    return {task: {key: round(fmean(values), 3) for key, values in row.items()} for task, row in found.items()}


def show(table: dict[str, dict[str, float]]) -> None:
    for task, row in table.items():
        low, high = READY
        verdict = "" if low <= row["greedy"] <= high else f"  the greedy reward is not between {low} and {high}"
        print(f"  {task:10}  " + "  ".join(f"{key} {value:.3f}" for key, value in sorted(row.items())) + verdict)


def train(trainer: Trainer, every: int) -> None:
    """Trains until the last step. After every `every` steps, the state and the model are saved, and rewards on held-out
    problems are printed."""
    sample = world.problems("heldout", world.SEEDS["heldout"], 32)
    started, losses = time.monotonic(), []
    while trainer.step < trainer.plan.steps:
        losses.append(trainer.train_step())
        if trainer.step % every == 0 or trainer.step == trainer.plan.steps:
            trainer.save_state()
            trainer.save_model()
            took = (time.monotonic() - started) / len(losses)
            left = took * (trainer.plan.steps - trainer.step) / 60
            part = trainer.plan.part(trainer.step - 1)
            print(
                f"step {trainer.step}/{trainer.plan.steps} {part}  loss {fmean(losses[-every:]):.3f}  "
                f"{took:.2f} s a step, {left:.0f} min left",
                flush=True,
            )
            if part != "eyes":
                show(report(trainer.model, trainer.prompter, sample))


def main() -> None:
    parser = argparse.ArgumentParser(description="Warm start of the scale model. Continues after an interruption.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, report.json and the training state")
    parser.add_argument("--eyes", type=int, default=800, help="optimizer steps of vision tower and projector")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps of the decoder, after --eyes")
    parser.add_argument("--messages", type=int, default=1200, help="steps with pooled answers in prompts, at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--heldout", type=int, default=256, help="held-out problems per task for the report")
    given = parser.parse_args()
    trainer = Trainer(given.out, TrainingSteps(given.eyes, given.steps, given.messages, given.seed))
    if trainer.step:
        print(f"continuing at step {trainer.step} of {trainer.plan.steps}")
    train(trainer, given.save_every)
    heldout = world.problems("heldout", world.SEEDS["heldout"], given.heldout)
    table = report(trainer.model, trainer.prompter, heldout)
    (given.out / "report.json").write_text(json.dumps(table, indent=2) + "\n")
    print(f"{given.out / 'model'}: rewards on {given.heldout} held-out problems per task")
    show(table)


if __name__ == "__main__":
    main()
