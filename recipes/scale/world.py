"""Draws pictures of coloured shapes and problems about these pictures. The same seed gives the same data.

Pictures are drawn here pixel by pixel, so that no version of a drawing library can change them.
`python -m recipes.scale.world` writes the shipped files of data/. train.jsonl and heldout.jsonl have problems with a
ground truth. open-train.jsonl and open-heldout.jsonl have open questions with a teacher's answers. The pictures of all
these problems are in pictures/. The data are stored as JSONL and PNG files, because people can read these files without
a special tool. A Parquet file would need such a tool.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from PIL import Image

Split = Literal["train", "heldout"]
TASKS = ("pointing", "grounding", "counting", "arithmetic", "worksheet")  # tasks with a ground truth
PIXELS = 112  # width and height of every picture; smaller than the scale model's view (224), so there are no crops
COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 180),
    "black": (30, 30, 30),
}
LABELS = "pqrs"  # names of a worksheet's sums
DIVISOR = 3  # worksheets ask for remainders after division by this number
SHAPES = ("ring", "square", "triangle", "cross")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
HELDOUT_BYTES = 32  # on average, 32 of every 256 pictures are held out, and 32 of every 256 sums
SIZES: dict[Split, int] = {"train": 512, "heldout": 256}  # problems per task in the shipped files
SEEDS: dict[Split, int] = {"train": 1, "heldout": 2}
OPEN_SEEDS: dict[Split, int] = {"train": 3, "heldout": 4}
# Minimum and maximum number of things in a crowd. With these limits, a writer that always gives the same number is
# right in at most 4 of 10 counting problems.
CROWD = (3, 5)
# Minimum and maximum number of things in the crowds of open questions. Most of these crowds have more things than the
# crowds of the warm start, so that RL can improve the descriptions.
OPEN_CROWD = (5, 8)
SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Thing:
    """One coloured shape. (`x`, `y`) is its centre and `half` is half of its side length, all in pixels."""

    color: str
    shape: str
    x: int
    y: int
    half: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def described(self) -> str:
        """Place and name, for example `top left red ring`."""
        return f"{self.place} {self.name}"

    @property
    def point(self) -> tuple[float, float]:
        """Centre (x, y), as fractions of the picture's side."""
        return self.x / PIXELS, self.y / PIXELS

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge, as fractions of the picture's side."""
        near, far = (self.x - self.half, self.y - self.half), (self.x + self.half, self.y + self.half)
        return near[0] / PIXELS, near[1] / PIXELS, far[0] / PIXELS, far[1] / PIXELS

    @property
    def cell(self) -> tuple[int, int]:
        """Column and row (0 to 2) of the cell that contains the centre. The picture has 3 x 3 cells."""
        return 3 * self.x // PIXELS, 3 * self.y // PIXELS

    @property
    def place(self) -> str:
        """The name of the cell, from PLACES."""
        column, row = self.cell
        return PLACES[3 * row + column]

    def mask(self) -> np.ndarray:
        """Returns a mask of the thing's box, [2 * half, 2 * half] bool. It is True for each pixel inside the shape."""
        line = (np.arange(2 * self.half) + 0.5) / self.half - 1  # pixel centres, -1 to 1
        u, v = np.abs(line)[None, :], line[:, None]
        if self.shape == "ring":
            return (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.25)
        if self.shape == "triangle":
            return u <= (v + 1) / 2 + 0.5 / self.half  # the last term widens the tip to one pixel
        if self.shape == "cross":
            return (u <= 0.36) | (np.abs(v) <= 0.36)
        return np.ones((2 * self.half, 2 * self.half), dtype=bool)


@dataclass(frozen=True)
class Scene:
    """A picture with a plain background and with things that do not overlap."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...]

    @cached_property
    def pixels(self) -> np.ndarray:
        """The colour number of each pixel, [PIXELS, PIXELS] uint8: 0 is the background, 1 is the first of COLORS, and
        so on."""
        canvas = np.zeros((PIXELS, PIXELS), dtype=np.uint8)
        for thing in self.things:
            rows = slice(thing.y - thing.half, thing.y + thing.half)
            columns = slice(thing.x - thing.half, thing.x + thing.half)
            canvas[rows, columns][thing.mask()] = 1 + list(COLORS).index(thing.color)
        return canvas

    @property
    def palette(self) -> np.ndarray:
        """The colours as RGB, [7, 3] uint8: the colour of the background, then the six colours of COLORS."""
        return np.array([self.background, *COLORS.values()], dtype=np.uint8)

    @property
    def image(self) -> Image.Image:
        """The picture as an image with a palette (mode P). The PNG file of such an image has less than a kilobyte."""
        image = Image.fromarray(self.pixels, mode="P")
        image.putpalette(self.palette.tobytes())
        return image

    @property
    def split(self) -> Split:
        return split_of(self.palette.tobytes() + self.pixels.tobytes())


@dataclass(frozen=True)
class Problem:
    """A question, its ground truth, and the facts that the demonstration writers need to answer the question."""

    task: str
    question: str
    truth: list[float] | str
    scene: Scene | None = None
    targets: tuple[Thing, ...] = ()  # the things that the question is about, in reading order
    terms: tuple[int, ...] = ()  # arithmetic: the numbers to add, with their signs
    lines: tuple[tuple[int, int], ...] = ()  # worksheet: the two terms of each sum
    messages: tuple[str, ...] = ()  # pooled answers that the prompt contains (PaCoRe)
    reference: str = ""  # describing: the teacher's answer


def split_of(content: bytes) -> Split:
    """Returns the split that a picture or sum belongs to. The split depends only on a hash of the content. So with
    every seed, training and the warm start contain no held-out problem."""
    return "heldout" if hashlib.sha256(content).digest()[0] < HELDOUT_BYTES else "train"


def draw_scene(rng: Generator, split: Split, things: tuple[int, int] = (1, 3)) -> Scene:
    """Draws a scene: things of different colours at random places. `things` is the minimum and maximum number of
    things."""
    while True:
        number = int(rng.integers(things[0], things[1] + 1))
        colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:number]]
        placed: list[Thing] = []
        for color in colors:
            half = int(rng.integers(11, 20))
            x, y = (int(v) for v in rng.integers(half + 2, PIXELS - half - 1, size=2))
            placed.append(Thing(color, SHAPES[int(rng.integers(len(SHAPES)))], x, y, half))
        scene = Scene(_background(rng), tuple(placed))
        if _apart(placed) and scene.split == split:
            return scene


def draw_crowd(rng: Generator, split: Split, things: tuple[int, int] = CROWD) -> Scene:
    """Draws a crowd: things of random shape, each in its own cell. `things` is the minimum and maximum number of
    things. The things have two colours, and both colours occur."""
    while True:
        number = int(rng.integers(things[0], things[1] + 1))
        one, other = (list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
        first = int(rng.integers(1, number))  # number of things of the first colour
        cells = [int(cell) for cell in rng.permutation(9)[:number]]
        colored = sorted(zip(cells, [one] * first + [other] * (number - first), strict=True))
        placed = [_thing_in(cell, color, SHAPES[int(rng.integers(len(SHAPES)))], rng) for cell, color in colored]
        scene = Scene(_background(rng), tuple(placed))
        if scene.split == split:
            return scene


def _thing_in(cell: int, color: str, shape: str, rng: Generator) -> Thing:
    third = PIXELS / 3
    half = int(rng.integers(10, 15))
    slack = third / 2 - half - 1
    x, y = ((c + 0.5) * third + rng.uniform(-slack, slack) for c in (cell % 3, cell // 3))
    return Thing(color, shape, int(x), int(y), half)


def _background(rng: Generator) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(215, 256, size=3))
    return red, green, blue


def _apart(things: list[Thing]) -> bool:
    pairs = ((a, b) for i, a in enumerate(things) for b in things[:i])
    return all(max(abs(a.x - b.x), abs(a.y - b.y)) > a.half + b.half + 1 for a, b in pairs)


def point_and_box(scene: Scene) -> Iterator[Problem]:
    """Yields a pointing and a grounding problem for each thing of the scene."""
    for thing in scene.things:
        point, box = ([round(v, 4) for v in values] for values in (thing.point, thing.box))
        yield Problem("pointing", f"Point at the {thing.name}.", point, scene, (thing,))
        yield Problem("grounding", f"Box the {thing.name}.", box, scene, (thing,))


def count_colors(scene: Scene) -> Iterator[Problem]:
    """Yields one counting problem for each colour in the scene."""
    for color in dict.fromkeys(thing.color for thing in scene.things):
        targets = tuple(thing for thing in scene.things if thing.color == color)
        yield Problem("counting", f"How many {color} things?", str(len(targets)), scene, targets)


def draw_sum(rng: Generator, split: Split) -> Problem:
    """Draws an arithmetic problem with three numbers, such as 17 + 5 - 8. The first number is between 1 and 19. Each of
    the other two is between 1 and 9, and is added or subtracted. No result is negative, not even after the first
    step."""
    while True:
        first, second, third = int(rng.integers(1, 20)), *(int(v) for v in rng.integers(1, 10, size=2))
        second, third = (v * (1 if rng.random() < 0.5 else -1) for v in (second, third))
        question = f"What is {first} {_signed(second)} {_signed(third)}?"
        if first + second >= 0 and first + second + third >= 0 and split_of(question.encode()) == split:
            truth = str(first + second + third)
            return Problem("arithmetic", question, truth, terms=(first, second, third))


def draw_worksheet(rng: Generator, split: Split) -> Problem:
    """Draws a worksheet: for each of LABELS, a sum of two numbers with two digits each. The ground truth has the
    remainder of each sum."""
    while True:
        lines = tuple(_two_terms(rng) for _ in LABELS)
        asked = ", ".join(f"{label}={sum_text(terms)}" for label, terms in zip(LABELS, lines, strict=True))
        question = f"What is left of {asked} by {DIVISOR}?"
        if split_of(question.encode()) == split:
            return Problem("worksheet", question, worksheet_answer([remainder(terms) for terms in lines]), lines=lines)


def _two_terms(rng: Generator) -> tuple[int, int]:
    """Draws two numbers with two digits each. Their sum also has two digits."""
    while True:
        first, second = (int(v) for v in rng.integers(10, 80, size=2))
        if first // 10 + second // 10 <= 8:
            return first, second


def remainder(terms: tuple[int, int]) -> int:
    """Returns the remainder of the sum after division by DIVISOR."""
    return sum(terms) % DIVISOR


def sum_text(terms: tuple[int, int]) -> str:
    """Formats a sum, for example `47+38`."""
    return f"{terms[0]}+{terms[1]}"


def worksheet_answer(results: Sequence[int | str]) -> str:
    """Formats the answer to a worksheet, for example `p=1, q=1, r=0, s=2`."""
    return ", ".join(f"{label}={result}" for label, result in zip(LABELS, results, strict=True))


def describe(crowd: Scene) -> Problem:
    """Returns a problem that asks the model to describe a crowd. The problem has no ground truth."""
    return Problem("describing", "What things are there?", "", crowd, crowd.things)


def teachers_words(crowd: Scene, rng: Generator) -> str:
    """Returns the teacher's answer: a correct description, except that the shape of one thing is random."""
    guessed = crowd.things[int(rng.integers(len(crowd.things)))]
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    return ", ".join((replace(thing, shape=shape) if thing is guessed else thing).described for thing in crowd.things)


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"


def problems(split: Split, seed: int, per_task: int) -> list[Problem]:
    """Draws problems and returns them grouped by task. `per_task` is the number of problems of each task."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[Problem]] = {task: [] for task in TASKS}
    while len(found["pointing"]) < per_task:
        for problem in point_and_box(draw_scene(rng, split)):
            found[problem.task].append(problem)
    while len(found["counting"]) < per_task:
        found["counting"].extend(count_colors(draw_crowd(rng, split)))
    questions: set[str] = set()
    for task, draw in (("arithmetic", draw_sum), ("worksheet", draw_worksheet)):
        while len(found[task]) < per_task:
            problem = draw(rng, split)
            if problem.question not in questions:
                questions.add(problem.question)
                found[task].append(problem)
    return [problem for task in TASKS for problem in found[task][:per_task]]


def open_problems(split: Split, seed: int, number: int) -> list[Problem]:
    """Draws problems that ask for a description of a crowd, each with a teacher's answer. `number` is the number of
    problems."""
    rng = np.random.default_rng(seed)
    crowds = [draw_crowd(rng, split, OPEN_CROWD) for _ in range(number)]
    return [replace(describe(crowd), reference=teachers_words(crowd, rng)) for crowd in crowds]


def user_message(question: str, picture: str | None) -> dict[str, Any]:
    """Returns the user's message of a row."""
    text = {"type": "text", "text": question}
    return {"role": "user", "content": [{"type": "image", "image": picture}, text] if picture else question}


def row(problem: Problem, identity: str, picture: str | None) -> dict[str, Any]:
    """Returns the data row of a problem. `picture` is the path of the picture, relative to the data file."""
    answer = {"reference": problem.reference} if problem.reference else {"ground_truth": problem.truth}
    messages = [user_message(problem.question, picture)]
    return {"id": identity, "task": problem.task, "messages": messages, **answer, "meta": {}}


def write(folder: Path, split: Split) -> list[Path]:
    """Writes `split`.jsonl, open-`split`.jsonl and their pictures into `folder`. Returns the paths of both files."""
    checked = problems(split, SEEDS[split], SIZES[split])
    opened = open_problems(split, OPEN_SEEDS[split], SIZES[split])
    return [_write(folder, split, checked, split), _write(folder, f"open-{split}", opened, split)]


def _write(folder: Path, name: str, selected: Sequence[Problem], split: Split) -> Path:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    paths: dict[int, str] = {}
    lines: list[str] = []
    for number, problem in enumerate(selected):
        if problem.scene is not None and id(problem.scene) not in paths:
            paths[id(problem.scene)] = path = f"pictures/{name}-{len(paths):03}.png"
            problem.scene.image.save(folder / path, bits=4, optimize=True)
        picture = paths.get(id(problem.scene))
        identity = f"{split}-{problem.task}-{number % SIZES[split]:03}"
        lines.append(json.dumps(row(problem, identity, picture)) + "\n")
    data = folder / f"{name}.jsonl"
    data.write_text("".join(lines))
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the scale model's data files.")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="output folder (default: folder of the shipped data)")
    folder: Path = parser.parse_args().out
    for split in SIZES:
        for data in write(folder, split):
            print(data)


if __name__ == "__main__":
    main()
