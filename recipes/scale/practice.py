"""Supervised training of the scale model: draws demonstrations, computes losses, and generates the model's answers.

Tested in tests/recipes/scale/test_warm_start.py and tests/recipes/scale/test_world.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from transformers import DynamicCache

from recipes.scale import world
from recipes.scale.world import Problem, Scene
from recipes.scale.writers import EXACT, ROUGH, answers_of_others, compare, repeat
from rl.model import attention
from rl.model.attention import Layout, Span
from rl.model.packed import embed
from rl.model.pictures import MEAN, STD
from rl.model.step_vl import StepVL
from rl.types import PooledAnswers, Prompt
from rollout.pacore.prompt import SynthesisPrompt

LONGEST = 176  # maximum tokens of a response; the writers and the judge use fewer
TEMPLATE = Path(__file__).parent / "pacore.jinja"
SYNTHESIS = SynthesisPrompt(TEMPLATE)
MESSAGES = (4, 24)  # minimum and maximum number of pooled answers in a synthesis problem
COPIES = 0.5  # share of the demonstrations that repeat a pooled answer


class Prompter:
    """Converts problems to token ids, with the tokenizer's chat template and the image tokens of the picture."""

    def __init__(self, tokenizer: Any, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.image_id = ids("<im_patch>")
        self.slots = [ids("<im_start>"), *[self.image_id] * image_tokens, ids("<im_end>")]
        self.end = ids("<|im_end|>")
        self._cached = lru_cache(maxsize=4096)(self._prompt)

    def prompt(self, problem: Problem) -> list[int]:
        """Returns the prompt's token ids. The list is cached, so callers must not change it."""
        return self._cached(problem.question, problem.scene is not None, problem.messages)

    def _prompt(self, question: str, pictured: bool, shown: tuple[str, ...]) -> list[int]:
        plain = (world.user_message(question, "picture" if pictured else None),)
        messages = SYNTHESIS.chat(Prompt("", "", plain, shown=PooledAnswers(shown)))
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [slot for token in ids for slot in (self.slots if token == self.image_id else [token])]

    def picture_end(self, prompt: Sequence[int]) -> int:
        """Returns the number of tokens up to the end of the prompt's last picture."""
        return len(prompt) - list(reversed(prompt)).index(self.slots[-1])

    def response(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.end]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True)
class Demonstrations:
    """A batch of problems. Each problem has a response that the model learns to imitate."""

    problems: list[Problem]
    responses: list[str]


def draw_demonstrations(
    rng: Generator, pictures: int, things: tuple[int, int], rough_share: Callable[[Problem], float], sheets: int
) -> Demonstrations:
    """Draws problems and their demonstrations. `pictures` is the number of scenes for pointing and grounding. There are
    twice as many crowds for counting and describing, and four times as many sums. `sheets` is the number of worksheets.
    `rough_share` returns the probability that the rough writer answers a problem."""
    scenes = [world.draw_scene(rng, "train", things) for _ in range(pictures)]
    crowds = [world.draw_crowd(rng, "train") for _ in range(2 * pictures)]
    problems = [p for scene in scenes for p in world.point_and_box(scene)]
    problems += [p for crowd in crowds for p in world.count_colors(crowd)]
    problems += [world.draw_sum(rng, "train") for _ in range(4 * pictures)]
    problems += [world.describe(crowd) for crowd in crowds]
    problems += [world.draw_worksheet(rng, "train") for _ in range(sheets)]
    writers = [ROUGH if rng.random() < rough_share(problem) else EXACT for problem in problems]
    return Demonstrations(problems, [writer(problem, rng) for writer, problem in zip(writers, problems, strict=True)])


def draw_synthesis_demonstrations(rng: Generator, number: int) -> Demonstrations:
    """Draws demonstrations whose prompts contain pooled answers. Each response compares the pooled answers, or repeats
    one of them. `number` is the number of problems of each task, but there are twice as many worksheets."""
    plain: list[Problem] = []
    for _ in range(number):
        plain += list(world.point_and_box(world.draw_scene(rng, "train", (2, 3))))[:2]  # two problems about one thing
        plain.append(next(world.count_colors(world.draw_crowd(rng, "train"))))
        plain.append(world.draw_sum(rng, "train"))
        plain += [world.draw_worksheet(rng, "train"), world.draw_worksheet(rng, "train")]
    counts = rng.integers(MESSAGES[0], MESSAGES[1] + 1, size=len(plain))
    problems = [replace(p, messages=answers_of_others(p, n, rng)) for p, n in zip(plain, counts, strict=True)]
    return Demonstrations(problems, [repeat(p, rng) if rng.random() < COPIES else compare(p, rng) for p in problems])


def draw_pictures(rng: Generator, pictures: int) -> list[Scene]:
    """Draws scenes and crowds (`pictures` of each), to train the vision tower without questions."""
    scenes = [world.draw_scene(rng, "train") for _ in range(pictures)]
    return scenes + [world.draw_crowd(rng, "train") for _ in range(pictures)]


@dataclass(frozen=True)
class Sightings:
    """The places of the things in S scenes. A scene has N image tokens. `seen` is True for each token that contains a
    thing's centre. Where `seen` is False, the other fields have no meaning."""

    seen: Tensor  # [S, N] bool
    color: Tensor  # [S, N] int64, index into COLORS
    form: Tensor  # [S, N] int64, index into SHAPES
    places: Tensor  # [S, N, 6] centre and box, as fractions of the picture


def scenes_of(problems: Sequence[Problem]) -> list[Scene]:
    """Returns each scene of the problems once, in the order of first use."""
    return list({id(p.scene): p.scene for p in problems if p.scene is not None}.values())


def pixels(model: StepVL, scenes: Sequence[Scene]) -> Tensor:
    """Returns the global views of all scenes, [scenes, 3, side, side]. For each picture, `model.views` returns the same
    view, up to rounding."""
    colors = (torch.from_numpy(np.stack([s.palette for s in scenes])).float() / 255 - MEAN.flatten()) / STD.flatten()
    canvas = torch.from_numpy(np.stack([s.pixels for s in scenes])).long()  # [S, P, P]
    image = colors[torch.arange(len(canvas))[:, None, None], canvas].permute(0, 3, 1, 2)
    side = (model.config.global_size,) * 2  # antialiasing is not needed, because a view is larger than a picture
    return F.interpolate(image, size=side, mode="bilinear", align_corners=False)


def features(model: StepVL, scenes: Sequence[Scene]) -> dict[int, Tensor]:
    """Returns a mapping: `id(scene)` -> image features [image tokens, hidden]."""
    if not scenes:
        return {}
    encoded = model.vit_large_projector(model.vision_model(pixels(model, scenes)))
    return {id(scene): feature for scene, feature in zip(scenes, encoded, strict=True)}


def sightings(scenes: Sequence[Scene], grid: int) -> Sightings:
    """Finds the image token that contains the centre of each thing. The image tokens of a picture form a square with
    `grid` tokens on each side."""
    shape = (len(scenes), grid * grid)
    seen = torch.zeros(shape, dtype=torch.bool)
    color, form = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    places = torch.zeros(*shape, 6)
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            token = grid * thing.y // world.PIXELS * grid + grid * thing.x // world.PIXELS
            seen[number, token] = True
            color[number, token] = list(world.COLORS).index(thing.color)
            form[number, token] = world.SHAPES.index(thing.shape)
            places[number, token] = torch.tensor([*thing.point, *thing.box])
    return Sightings(seen, color, form, places)


class SightHead(nn.Module):
    """Linear heads. For each image token, the heads predict whether the token contains the centre of a thing, and the
    place and the name of this thing.

    The score of a colour or shape is the similarity between the image token and the decoder's embedding of the word for
    this colour or shape. So the token of a red ring becomes similar to the embeddings of "red" and "ring" before the
    decoder is trained.
    """

    def __init__(self, model: StepVL, tokenizer: Any) -> None:
        super().__init__()
        hidden = model.config.hidden_size
        self.exists = nn.Linear(hidden, 1)
        self.places = nn.Linear(hidden, 6)
        self.digits = nn.Linear(hidden, 60)
        for kind, words in (("colors", list(world.COLORS)), ("forms", world.SHAPES)):
            ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
            embeddings = model.model.embed_tokens.weight.detach()[torch.tensor(ids)[:, 0]].clone()
            self.register_buffer(kind, LIKENESS * embeddings, persistent=False)


LIKENESS = 5.0  # factor for the word embeddings, whose norms are small; without it, image tokens would need large norms


def sight_loss(model: StepVL, head: SightHead, scenes: Sequence[Scene]) -> Tensor:
    """Returns the loss of the head's predictions. Each coordinate is predicted as a number, and also as its first
    decimal digit."""
    tokens = model.vit_large_projector(model.vision_model(pixels(model, scenes)))
    truth = sightings(scenes, math.isqrt(tokens.shape[1]))
    exists = F.binary_cross_entropy_with_logits(head.exists(tokens)[..., 0], truth.seen.float())
    shown, places = tokens[truth.seen], truth.places[truth.seen]
    names = F.cross_entropy(shown @ head.colors.T, truth.color[truth.seen])
    names = names + F.cross_entropy(shown @ head.forms.T, truth.form[truth.seen])
    digits = head.digits(shown).unflatten(-1, (6, 10)).flatten(0, 1)
    digit_loss = F.cross_entropy(digits, (10 * places).long().clamp(0, 9).flatten())
    return 3 * exists + names + digit_loss + 10 * F.l1_loss(head.places(shown), places)


def decoder_inputs(model: StepVL, ids: Tensor, problems: Sequence[Problem], seen: dict[int, Tensor]) -> Tensor:
    """Returns decoder inputs [B, T, hidden] for `ids` [B, T], with the pictures' features at the image tokens."""
    words = model.model.embed_tokens(ids)
    shown = [seen[id(p.scene)] for p in problems if p.scene is not None]
    return words.masked_scatter((ids == model.config.image_token_id)[..., None], torch.cat(shown)) if shown else words


@dataclass(frozen=True)
class PackedDemonstrations:
    """Demonstrations in one packed row. The row contains the tokens of each picture once, and then all questions about
    this picture, each with a response."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    is_response: Tensor  # [T] bool; True on the tokens of responses
    is_message: Tensor  # [T] bool; in prompts with pooled answers, True on the tokens after the picture
    layout: Layout
    scenes: list[Scene]  # in the order of their image tokens in the row


def pack(prompter: Prompter, batch: Demonstrations) -> PackedDemonstrations:
    """Packs demonstrations. Questions about the same scene share the scene's tokens."""
    groups: dict[int, list[tuple[list[int], list[int], bool]]] = defaultdict(list)
    scenes: dict[int, Scene] = {}
    for number, (problem, response) in enumerate(zip(batch.problems, batch.responses, strict=True)):
        key = number if problem.scene is None else -id(problem.scene)
        groups[key].append((prompter.prompt(problem), prompter.response(response), bool(problem.messages)))
        if problem.scene is not None:
            scenes[key] = problem.scene
    tokens: list[tuple[int, int, bool, bool]] = []  # values for the first four fields of PackedDemonstrations
    spans = []
    for key, members in groups.items():
        shared = prompter.picture_end(members[0][0]) if key in scenes else 0
        spans.append(Span(shared, tuple(len(p) + len(r) - shared for p, r, _ in members)))
        tokens += [(token, position, False, False) for position, token in enumerate(members[0][0][:shared])]
        for prompt, response, shows in members:
            for position, token in enumerate((prompt + response)[shared:], shared):
                in_prompt = position < len(prompt)
                tokens.append((token, position, not in_prompt, shows and in_prompt))
    ids, positions, is_response, is_message = (torch.tensor(column) for column in zip(*tokens, strict=True))
    layout = Layout(tuple(spans))
    return PackedDemonstrations(ids, positions, is_response, is_message, layout, list(scenes.values()))


def loss(model: StepVL, prompter: Prompter, batch: Demonstrations) -> Tensor:
    """Returns the loss in nats: the mean cross-entropy of the response tokens, plus the mean cross-entropy of the
    pooled answers in the prompts. To predict a pooled answer well, the model has to learn to compute the median of the
    previous pooled answers."""
    row = pack(prompter, batch)
    with torch.no_grad():  # the vision tower is frozen
        seen = features(model, row.scenes)
    slots = row.token_ids == model.config.image_token_id
    inputs = embed(model.model.embed_tokens, row.token_ids, slots, [seen[id(scene)] for scene in row.scenes])
    hidden = model.model(
        inputs_embeds=inputs[None], position_ids=row.position_ids[None], use_cache=False, layout=row.layout
    ).last_hidden_state[0]
    # In the row, a response or message directly follows its own question. So every token of a response or
    # message is predicted from the previous token of the row.
    total = torch.zeros(())
    for mask in (row.is_response, row.is_message):
        if len(places := mask.nonzero()[:, 0]):
            total = total + F.cross_entropy(model.lm_head(hidden[places - 1]).float(), row.token_ids[places])
    return total


@torch.no_grad()
def answers(
    model: StepVL, prompter: Prompter, problems: Sequence[Problem], generator: torch.Generator | None = None
) -> list[str]:
    """Returns the model's responses. The responses are greedy, or sampled at temperature 1 if `generator` is given."""
    seen = features(model, scenes_of(problems))
    groups: dict[int, list[int]] = defaultdict(list)  # prompts of equal length are decoded together, without padding
    for i, problem in enumerate(problems):
        groups[len(prompter.prompt(problem))].append(i)
    result = [""] * len(problems)
    model.model.set_attn_implementation("sdpa")  # packed attention does not support a cache
    for members in groups.values():
        chosen = [problems[i] for i in members]
        ids = torch.tensor([prompter.prompt(problem) for problem in chosen])
        tokens = _decode(model, ids, decoder_inputs(model, ids, chosen, seen), prompter.end, generator)
        for i, row in zip(members, tokens.tolist(), strict=True):
            result[i] = prompter.text(row[: row.index(prompter.end)] if prompter.end in row else row)
    model.model.set_attn_implementation(attention.NAME)
    return result


def _decode(model: StepVL, ids: Tensor, inputs: Tensor, end: int, generator: torch.Generator | None) -> Tensor:
    cache, chosen = DynamicCache(config=model.config.text_config), []
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(LONGEST):
        hidden = model.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
        logits = model.lm_head(hidden[:, -1])
        if generator is None:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        chosen.append(token)
        ended |= token == end
        if ended.all():
            break
        inputs = model.model.embed_tokens(token)[:, None]
    return torch.stack(chosen, dim=1)
