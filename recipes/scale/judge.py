"""Trains the scale model's judge, a small generative reward model, with supervision on generated pairs of descriptions.

    python -m recipes.scale.judge --out runs/judge

Training starts from the scale model's weights. The judge learns to compare two descriptions of a picture. For each
thing in the picture, the verdict repeats the name that each response gives to the thing, and says whether the name is
right. At the end, the verdict gives two numbers for each response: the number of right names, and the grade. The judge
reads the prompt of the reward `genrm` (with the file genrm.jinja) and answers with the JSON that this reward expects.
The results are OUT/model (a Hugging Face folder) and OUT/report.json.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from transformers import AutoTokenizer

from recipes.scale import practice, tokenizer, warm_start, world
from recipes.scale.practice import Demonstrations, Prompter
from recipes.scale.world import COLORS, PLACES, SHAPES, Problem, Scene
from rewards.genrm import BEST, SHOWN, Comparison, GenRM
from rewards.judge import Judge
from rl.model import attention, hf_folder
from rl.model.config import register
from rl.model.step_vl import StepVL
from rl.types import Prompt

TEMPLATE = Path(__file__).parent / "genrm.jinja"
START = Path(__file__).parent / "model"
BATCH = 16  # pairs per step
THINGS = (world.CROWD[0], world.OPEN_CROWD[1])  # minimum and maximum number of things in a picture
PEAK_LR, WARM_UP = 1.5e-3, 50
# In the first 37.5% of the steps, draw_guesses draws 3 of 4 pairs, and draw_pair draws the other pairs. In the other
# steps, each of the two functions draws half of the pairs.
READING = 0.375


@dataclass(frozen=True)
class Pair:
    """A crowd and two descriptions of it, which the judge compares."""

    crowd: Scene
    first: str
    second: str

    @property
    def swapped(self) -> "Pair":
        return replace(self, first=self.second, second=self.first)


@dataclass(frozen=True)
class Correctness:
    """Measures how correct a description is. `right` is the number of things that are described correctly. `of` is the
    number of things in the description or in the picture, whichever is larger."""

    right: int
    of: int

    @property
    def grade(self) -> int:
        """Grade of the description, from 0 to BEST."""
        return round(BEST * self.right / self.of)


def correctness(response: str, crowd: Scene) -> Correctness:
    """Counts the things that are described correctly. If a description names several things at one place, only the
    first of them can be right."""
    named = _by_place(response)
    right = sum(named.get(thing.place) == thing.name for thing in crowd.things)
    return Correctness(right, max(len(crowd.things), len(_items(response))))


def _items(response: str) -> list[str]:
    return [item.strip() for item in response.split(",")]


def _by_place(response: str) -> dict[str, str]:
    """Returns a mapping: place -> the first thing that the response names at this place."""
    names: dict[str, str] = {}
    for item in _items(response):
        place, *name = item.rsplit(" ", 2)
        if len(name) == 2:
            names.setdefault(place, " ".join(name))
    return names


def verdict(pair: Pair) -> Comparison:
    """Returns the correct verdict on a pair. For each thing, the verdict repeats the name that each response gives to
    the thing, and says whether the name is right. At the end, the verdict gives two numbers for each response: the
    number of right names, and the grade."""
    named = {"A": _by_place(pair.first), "B": _by_place(pair.second)}
    compared = ", ".join(
        thing.described + "".join(_compared(side, named[side].get(thing.place), thing.name) for side in named)
        for thing in pair.crowd.things
    )
    a, b = correctness(pair.first, pair.crowd), correctness(pair.second, pair.crowd)
    reasoning = f"{compared}. A {a.right} of {a.of}, B {b.right} of {b.of}"
    return Comparison(reasoning=reasoning, grade_a=a.grade, grade_b=b.grade)


def _compared(side: str, name: str | None, truth: str) -> str:
    return f" {side} no" if name is None else f" {side} {name} {'yes' if name == truth else 'no'}"


def verdict_json(comparison: Comparison) -> str:
    """Returns the verdict as JSON without spaces, with integer grades."""
    grades = {"grade_a": int(comparison.grade_a), "grade_b": int(comparison.grade_b)}
    values = {"reasoning": comparison.reasoning, **grades}
    return json.dumps(values, separators=(",", ":"))


def draw_pair(rng: Generator, split: world.Split, things: tuple[int, int] = THINGS) -> Pair:
    """Draws a crowd and two descriptions of random quality. Both descriptions have the same chance of being the better
    one."""
    crowd = world.draw_crowd(rng, split, things)
    return Pair(crowd, draw_response(crowd, rng), draw_response(crowd, rng))


def draw_guesses(rng: Generator, split: world.Split, things: tuple[int, int] = THINGS) -> Pair:
    """Draws a crowd and two descriptions with the right places and mostly wrong names. From such descriptions, the
    judge learns to read the text. If all descriptions were good, the judge would only learn to name what is in the
    picture."""
    crowd = world.draw_crowd(rng, split, things)
    return Pair(crowd, _guesses(crowd, rng), _guesses(crowd, rng))


def _guesses(crowd: Scene, rng: Generator) -> str:
    said = []
    for thing in crowd.things:
        color = thing.color if rng.random() < 0.75 else rng.choice(list(COLORS))
        shape = thing.shape if rng.random() < 0.3 else rng.choice(SHAPES)
        if rng.random() < 0.8:
            said.append(f"{thing.place} {color} {shape}")
    return ", ".join(said or [_any_thing(rng)])


def draw_preference(rng: Generator, split: world.Split, things: tuple[int, int] = THINGS) -> Pair:
    """Draws a pair whose first description is the better one."""
    while True:
        pair = draw_pair(rng, split, things)
        grades = correctness(pair.first, pair.crowd).grade, correctness(pair.second, pair.crowd).grade
        if grades[0] != grades[1]:
            return pair if grades[0] > grades[1] else pair.swapped


def draw_response(crowd: Scene, rng: Generator) -> str:
    """Draws a description. It is a teacher's answer, an unrelated text, or a list of the things with random mistakes:
    wrong shapes, colours or places, and missing, repeated or invented things."""
    kind = rng.random()
    if kind < 0.2:
        return world.teachers_words(crowd, rng)
    if kind < 0.25:
        return _beside_the_point(rng)
    slips = rng.choice([0.0, 0.1, 0.3, 0.7])
    said = [_slipped(thing.described, rng) if rng.random() < slips else thing.described for thing in crowd.things]
    if rng.random() < 0.3:
        said = [said[i] for i in sorted(rng.permutation(len(said))[: rng.integers(1, len(said) + 1)])]
    if rng.random() < 0.15:
        said.insert(int(rng.integers(len(said) + 1)), said[rng.integers(len(said))])
    if rng.random() < 0.15:
        said.insert(int(rng.integers(len(said) + 1)), _any_thing(rng))
    return ", ".join(said)


def _any_thing(rng: Generator) -> str:
    return f"{rng.choice(PLACES)} {rng.choice(list(COLORS))} {rng.choice(SHAPES)}"


def _slipped(described: str, rng: Generator) -> str:
    """Replaces one part of a thing's description: the place, the colour or the shape, chosen at random. The shape is
    replaced most often, because it is hardest to see."""
    place, color, shape = described.rsplit(" ", 2)
    which = rng.choice(3, p=[0.25, 0.25, 0.5])
    return " ".join(
        str(rng.choice(others)) if i == which else word
        for i, (word, others) in enumerate(((place, PLACES), (color, list(COLORS)), (shape, SHAPES)))
    )


def _beside_the_point(rng: Generator) -> str:
    """Draws an unrelated text: the answer to another task, a colour, or one thing repeated."""
    thing = _any_thing(rng)
    texts = [
        f"\\boxed{{{rng.integers(10)}}}",
        f"[{rng.random():.2f}, {rng.random():.2f}]",
        str(rng.choice(list(COLORS))),
    ]
    return str(rng.choice([*texts, ", ".join([thing] * int(rng.integers(2, 7)))]))


@cache
def _judge() -> Judge[Comparison]:
    """Returns the judge of the reward `genrm`. The judge has no endpoint, because it only renders prompts."""
    judge = GenRM("judge", template=str(TEMPLATE)).judge
    judge.load(SHOWN)
    return judge


def problem_of(pair: Pair) -> Problem:
    """Renders a pair as a prompt of the judge, with the code of the reward `genrm`."""
    # The id of this row is pair.first. In the prompt, the delimiters around each text depend on the id.
    row = Prompt(pair.first, "describing", ())
    shown = f"(picture 1)\n{world.describe(pair.crowd).question}"
    text = _judge().prompt(row, {"question": shown}, {"response_a": pair.first, "response_b": pair.second})
    return Problem("judging", text, "", pair.crowd)


def vocabulary() -> list[str]:
    """Returns the words that occur in the judge's prompt or verdict. Each word becomes a token of its own."""
    pair = Pair(Scene((255, 255, 255), ()), "", "")
    text = problem_of(pair).question + " picture response end of reasoning grade A B"
    return sorted(set(re.findall(r"[^\W\d_]{2,}", re.sub(r"[0-9a-f]{16}", "", text))) | {"A", "B", "yes", "no"})


def with_new_tokens(start: Path, words: Any) -> StepVL:
    """Loads the model in `start` for the tokenizer `words`. New tokens get random vectors; known tokens keep their
    vectors."""
    old: Any = hf_folder.load(start)
    old_tokenizer: Any = AutoTokenizer.from_pretrained(start, trust_remote_code=False)
    before = old_tokenizer.get_vocab()
    torch.manual_seed(0)
    model = StepVL(warm_start.config(words))
    known = [(number, before[token]) for token, number in words.get_vocab().items() if token in before]
    to, of = (torch.tensor(column) for column in zip(*known, strict=True))
    weights = old.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = model.state_dict()[name].clone()
        rows[to] = weights[name][of]
        weights[name] = rows
    model.load_state_dict(weights)
    model.model.set_attn_implementation(attention.NAME)
    return model


def train(
    model: StepVL, prompter: Prompter, steps: int, seed: int, every: int, things: tuple[int, int] = THINGS
) -> None:
    """Trains the model for `steps` optimizer steps. Each step has a batch of pairs and their verdicts. The vision tower
    and the projector are frozen. After every `every` steps, a report is printed."""
    optimizer = warm_start.decoder_optimizer(model)
    losses, started = [], time.monotonic()
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        guesses = BATCH * 3 // 4 if step < READING * steps else BATCH // 2
        pairs = [(draw_guesses if i < guesses else draw_pair)(rng, "train", things) for i in range(BATCH)]
        responses = [verdict_json(verdict(pair)) for pair in pairs]
        loss = practice.loss(model, prompter, Demonstrations([problem_of(pair) for pair in pairs], responses))
        rate = PEAK_LR * min(1, (step + 1) / WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        warm_start.update(optimizer, loss, rate)
        losses.append(float(loss.detach()))
        if (step + 1) % every == 0 or step + 1 == steps:
            took = (time.monotonic() - started) / (step + 1)
            share = report(model, prompter, 32, seed=seed, things=things)
            print(
                f"step {step + 1}/{steps}  loss {fmean(losses[-every:]):.3f}  {took:.2f} s a step  {share}", flush=True
            )


def grades(model: StepVL, prompter: Prompter, pairs: Sequence[Pair]) -> list[tuple[float, float] | None]:
    """Returns the two grades in the judge's greedy verdict for each pair, or None for a pair whose verdict is
    invalid."""
    given = practice.answers(model, prompter, [problem_of(pair) for pair in pairs])
    return [_read(text) for text in given]


def _read(text: str) -> tuple[float, float] | None:
    try:
        comparison = Comparison.model_validate_json(text)
    except ValueError:
        return None
    return comparison.grade_a, comparison.grade_b


def report(
    model: StepVL, prompter: Prompter, number: int, seed: int = 0, things: tuple[int, int] = THINGS
) -> dict[str, float]:
    """Tests the judge on held-out preferences, and returns four shares. `number` is the number of preferences. The
    first three are shares of pairs in which the better response gets the better grade. For the first share, the better
    response is shown first. For the second share, it is shown second. For the third share, the grades of both orders
    are averaged, as in the reward. The fourth is the share of invalid verdicts."""
    rng = np.random.default_rng([seed, 1 << 20])
    pairs = [draw_preference(rng, "heldout", things) for _ in range(number)]
    first, second = grades(model, prompter, pairs), grades(model, prompter, [pair.swapped for pair in pairs])
    leads = [
        (0.0 if a is None else a[0] - a[1], 0.0 if b is None else b[1] - b[0])
        for a, b in zip(first, second, strict=True)
    ]
    shares = {
        "better shown first": fmean(a > 0 for a, _ in leads),
        "better shown second": fmean(b > 0 for _, b in leads),
        "both orders": fmean(a + b > 0 for a, b in leads),
        "no verdict": fmean(pair is None for pair in [*first, *second]),
    }
    return {name: round(share, 3) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the scale model's judge.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and report.json")
    parser.add_argument(
        "--start", type=Path, default=START, help="scale model to start from (default: the shipped model)"
    )
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    allowed = range(THINGS[0], len(PLACES) + 1)
    parser.add_argument(
        "--most", type=int, default=THINGS[1], choices=allowed, help="maximum number of things in a picture"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between reports on held-out preferences")
    parser.add_argument("--heldout", type=int, default=512, help="number of held-out preferences for the report")
    given = parser.parse_args()
    register()
    folder = given.out / "model"
    tokenizer.save(folder, vocabulary())
    words: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = with_new_tokens(given.start, words)
    prompter = Prompter(words, model.config.image_token_len)
    things = (THINGS[0], given.most)
    train(model, prompter, given.steps, given.seed, given.every, things)
    warm_start.save(model, folder)
    shares = report(model, prompter, given.heldout, things=things)
    (given.out / "report.json").write_text(json.dumps(shares, indent=2) + "\n")
    print(f"{folder}: {shares}")


if __name__ == "__main__":
    main()
