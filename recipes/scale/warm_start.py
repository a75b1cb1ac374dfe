"""Supervised warm start of the scale model: from random weights to one that answers, not yet well.

    python -m recipes.scale.warm_start --out runs/scale

first teaches tower and projector to tell which thing lies where, on freshly drawn pictures, then, with these
frozen, the decoder to answer as two writers do (writers.py), and at last to do so with answers of others before it.
It writes OUT/model (a Hugging Face folder; the one
that ships beside this file was made this way) and OUT/report.json. Interrupted, the same command goes on from
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
from recipes.scale.writers import ROUGH, rough_share
from rl.model import attention, hf_folder
from rl.model.config import StepVLConfig, register
from rl.model.step_vl import StepVL
from rl.types import SYNTHESIS_TEMPLATE, Prompt, Rollout

REWARDS: dict[str, tuple[str, dict[str, Any]]] = {  # as in recipes/rlvr.yaml
    "pointing": ("point_distance", {}),
    "grounding": ("iou", {"power": 1}),
    "counting": ("exact", {}),
    "arithmetic": ("math_verify", {}),
    "worksheet": ("exact", {}),
}
READY = (0.2, 0.6)  # greedy held-out reward of every task, so that reinforcement learning has work to do
EYES = ("vision_model.", "vit_large_projector.")
PEAK_LR, WARM_UP, BETAS = 2e-3, 50, (0.9, 0.98)
PICTURES = 8  # scenes and crowds a step, each; and as many worksheets
HORIZON = 3000  # decoder steps over which the learning rate would fall to nearly nothing; it stops before
LAST = 400  # of these steps at the end in which the rough writer has the upper hand
PLAIN, SHEETS, WITH_MESSAGES = 3, 10, 4  # scenes, worksheets, problems of each task with messages; of the last part


def config(words: Any) -> StepVLConfig:
    """A StepVL of 1.4 million parameters: views of 224 pixels, 16 image tokens, crops of 168 pixels, 9 tokens."""
    ids = words.convert_tokens_to_ids
    ends = [ids("<|endoftext|>"), ids("<|im_end|>"), ids("<im_patch>")]  # as the 10B's: the last is the image token
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


def newborn(words: Any, seed: int) -> StepVL:
    """Random weights, but positions that start as 2-D sines and cosines: from random ones the model learns the
    answers' format and nothing about places for a long time."""
    torch.manual_seed(seed)
    model = StepVL(config(words))
    model.model.set_attn_implementation(attention.NAME)
    table = model.vision_model.positional_embedding
    with torch.no_grad():
        table.copy_(_sines(model.vision_model.grid, table.shape[1]))
    return model


def _sines(grid: int, width: int) -> Tensor:
    """[grid * grid, width]: half of the channels know the row, half the column."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)
    return 0.5 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def update(optimizer: AdamW, loss: Tensor, rate: float) -> None:
    """One optimizer step at a learning rate, with gradients of at most norm 1."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


@dataclass(frozen=True)
class Plan:
    """How long to train: optimizer steps of tower and projector, then of the decoder, then of it with messages."""

    eyes: int
    words: int
    messages: int
    seed: int

    @property
    def alone(self) -> int:
        """Steps before the first messages."""
        return self.eyes + self.words

    @property
    def steps(self) -> int:
        return self.alone + self.messages

    def part(self, step: int) -> str:
        """What a step (from 0) teaches."""
        return "eyes" if step < self.eyes else "words" if step < self.alone else "messages"


class School:
    """Model and optimizers under training; a step's data depends on seed and step only, so it can go on anywhere."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan, self.step = folder, plan, 0
        register()  # the tokenizer's loader looks at the config beside it
        tokenizer.save(folder / "model")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
        self.model = newborn(self.tokenizer, plan.seed)
        self.head = practice.SightHead(self.model, self.tokenizer)  # only teaches the eyes; no part of the model
        self.prompter = Prompter(self.tokenizer, self.model.config.image_token_len)
        sight = [p for name, p in self.model.named_parameters() if name.startswith(EYES)]
        self.eyes = AdamW([*sight, *self.head.parameters()], betas=BETAS, weight_decay=0.0)
        self.words = self._of_decoder()
        if self.state_file.exists():
            self._resume()

    def _of_decoder(self) -> AdamW:
        rest = [p for name, p in self.model.named_parameters() if not name.startswith(EYES)]
        return AdamW(rest, betas=BETAS, weight_decay=0.0)

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    def learn(self) -> float:
        """One optimizer step. Returns its loss."""
        plan, rng = self.plan, np.random.default_rng([self.plan.seed, self.step])
        part = plan.part(self.step)
        first = {"eyes": 0, "words": plan.eyes, "messages": plan.alone}[part]
        done = (self.step - first) / {"eyes": plan.eyes, "words": HORIZON, "messages": plan.messages}[part]
        if self.step == plan.alone:
            self.words = self._of_decoder()  # its moments are those of another lesson
        if part == "eyes":
            loss = practice.sight_loss(self.model, self.head, practice.some_scenes(rng, PICTURES))
        else:
            loss = practice.loss(self.model, self.prompter, self._lesson(part, rng, done))
        optimizer = self.eyes if part == "eyes" else self.words
        rate = PEAK_LR * min(1, (self.step - first + 1) / WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        update(optimizer, loss, rate)
        self.step += 1
        return float(loss.detach())

    def _lesson(self, part: str, rng: np.random.Generator, done: float) -> practice.Lesson:
        if part == "messages":
            plain = practice.lesson(rng, PLAIN, things(1), rough_share, SHEETS)
            shown = practice.synthesis_lesson(rng, WITH_MESSAGES)
            return practice.Lesson(plain.problems + shown.problems, plain.responses + shown.responses)
        share = rough_share if self.step >= self.plan.alone - LAST else both_writers
        return practice.lesson(rng, PICTURES, things(done), share, PICTURES)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {**dict(self.model.named_parameters(prefix="model")), **dict(self.head.named_parameters(prefix="head"))}

    def save_state(self) -> None:
        """Weights, moments and position in one file, replaced in one step."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters().items():
            tensors[name] = parameter.detach()
            moments = self.eyes.state.get(parameter) or self.words.state.get(parameter) or {}
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
                    f"{self.state_file} was begun with {position}, not {asdict(self.plan)}: "
                    "use the same values, or another --out"
                )
            kept = set(file.keys())
            for name, parameter in self._parameters().items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(name))
                if f"step:{name}" in kept:
                    optimizer = (
                        self.eyes if name.startswith((*(f"model.{prefix}" for prefix in EYES), "head.")) else self.words
                    )
                    optimizer.state[parameter] = {
                        k: file.get_tensor(f"{k}:{name}") for k in ("step", "exp_avg", "exp_avg_sq")
                    }

    def save_model(self) -> None:
        save(self.model, self.folder / "model", templates={SYNTHESIS_TEMPLATE: practice.TEMPLATE.read_text()})


def save(model: StepVL, folder: Path, templates: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes what vLLM needs beside the tokenizer that is in `folder` already; `templates` by file name."""
    hf_folder.save(model, folder, templates=templates)
    text = model.config.text_config
    generation = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}, indent=2) + "\n")


def things(done: float) -> tuple[int, int]:
    """How many things a scene has: one at first, so that reading a place is learned; then always several, so that
    the question has to be read."""
    return (1, 1) if done < 0.03 else (2, 3)


def both_writers(problem: Problem) -> float:
    """The rough writer's share of the demonstrations while both manners are learned."""
    return 0.4


def score(problem: Problem, text: str) -> float:
    """The reward that the task's responses get in training."""
    prompt = Prompt("warm-start", problem.task, (), ground_truth=problem.truth)
    given = rewards.get(*REWARDS[problem.task])(Rollout(prompt, text))
    return given.value if isinstance(given, rewards.Score) else float(given)


def report(
    model: StepVL, prompter: Prompter, problems: Sequence[Problem], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Per task: greedy reward; at temperature 1 the share of rough responses, and the reward of either kind."""
    greedy = practice.answers(model, prompter, problems)
    sampled = practice.answers(model, prompter, problems, generator=torch.Generator().manual_seed(seed))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for problem, first, second in zip(problems, greedy, sampled, strict=True):
        rough = second.startswith(ROUGH.opening[problem.task])
        found[problem.task]["greedy"].append(score(problem, first))
        found[problem.task]["rough share"].append(rough)
        found[problem.task]["rough" if rough else "exact"].append(score(problem, second))
    return {task: {key: round(fmean(values), 3) for key, values in row.items()} for task, row in found.items()}


def show(table: dict[str, dict[str, float]]) -> None:
    for task, row in table.items():
        low, high = READY
        verdict = "" if low <= row["greedy"] <= high else f"  greedy is not within {low} to {high}"
        print(f"  {task:10}  " + "  ".join(f"{key} {value:.3f}" for key, value in sorted(row.items())) + verdict)


def train(school: School, every: int) -> None:
    """Learns to the end of the plan; every `every` steps saves state and model, and shows a few held-out rewards."""
    glance = world.problems("heldout", world.SEEDS["heldout"], 32)
    started, losses = time.monotonic(), []
    while school.step < school.plan.steps:
        losses.append(school.learn())
        if school.step % every == 0 or school.step == school.plan.steps:
            school.save_state()
            school.save_model()
            took = (time.monotonic() - started) / len(losses)
            left = took * (school.plan.steps - school.step) / 60
            part = school.plan.part(school.step - 1)
            print(
                f"step {school.step}/{school.plan.steps} {part}  loss {fmean(losses[-every:]):.3f}  "
                f"{took:.2f} s a step, {left:.0f} min left",
                flush=True,
            )
            if part != "eyes":
                show(report(school.model, school.prompter, glance))


def main() -> None:
    parser = argparse.ArgumentParser(description="Warm start of the scale model; goes on where it was interrupted.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, report.json and the state")
    parser.add_argument("--eyes", type=int, default=800, help="optimizer steps of tower and projector")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps of the decoder, after them")
    parser.add_argument("--messages", type=int, default=1200, help="further ones, with answers of others in prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--heldout", type=int, default=256, help="held-out problems per task for the report")
    given = parser.parse_args()
    school = School(given.out, Plan(given.eyes, given.steps, given.messages, given.seed))
    if school.step:
        print(f"going on at step {school.step} of {school.plan.steps}")
    train(school, given.save_every)
    heldout = world.problems("heldout", world.SEEDS["heldout"], given.heldout)
    table = report(school.model, school.prompter, heldout)
    (given.out / "report.json").write_text(json.dumps(table, indent=2) + "\n")
    print(f"{given.out / 'model'}: rewards on {given.heldout} held-out problems a task")
    show(table)


if __name__ == "__main__":
    main()
