"""Two simulated writers whose demonstrations the warm start learns from, and the prompt they answer.

The *exact* writer does the work: it looks once and gives two decimals, goes through what it sees one by one
and counts along, writes each step of a sum. The *rough* writer talks and guesses: it names a third of the picture and
answers its centre, rounds boxes, takes every number of things for two, forgets to carry. Its answers are right
often enough to start from, and the model imitates it more often; reinforcement learning has to find out who is
worth imitating. They differ from the first words on, and both are short.

Nobody has the time for a whole worksheet: the exact writer works out all of its sums but one, now this, now that, and
says there that nothing is left. Only many answers together tell all of it.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from recipes.scale.world import LABELS, PLACES, SHAPES, Problem, Thing, labelled, left_over

BOX_STEP = 0.2  # the rough writer's ruler, as a fraction of the picture
FAVOURITE_COLORS = ("red", "blue")
USUAL_COUNT = 2
WORKED_OUT = 3  # sums of a worksheet: with all four, problem and response would not fit into 136 tokens
THIRDS = (0.17, 0.5, 0.83)  # centres of the thirds of the picture


@dataclass(frozen=True)
class Writer:
    """Answers each task in its own manner; `opening` is how each of its responses to the task begins."""

    write: dict[str, Callable[[Problem, Generator], str]]
    opening: dict[str, str]

    def __call__(self, problem: Problem, rng: Generator) -> str:
        return self.write[problem.task](problem, rng)


def numbers(values: tuple[float, ...] | list[float]) -> str:
    """`[0.25, 0.50]`: how points and boxes are written."""
    return f"[{', '.join(f'{min(value, 0.99):.2f}' for value in values)}]"


def _exact_point(problem: Problem, _: Generator) -> str:
    return numbers(problem.targets[0].point)


def _exact_box(problem: Problem, _: Generator) -> str:
    return numbers(problem.targets[0].box)


def _exact_count(problem: Problem, _: Generator) -> str:
    assert problem.scene
    steps, count = [], 0
    for thing in problem.scene.things:
        count += thing in problem.targets
        steps.append(f"{thing.place} {thing.color}" + (f" {count}" if thing in problem.targets else ""))
    return f"<think>one by one</think>{', '.join(steps)}, \\boxed{{{count}}}"


def _exact_sum(problem: Problem, _: Generator) -> str:
    first, second, third = problem.terms
    between = first + second
    question = f"{first}{second:+}{third:+}"
    steps = f"first {first}{second:+}={between}, then {between}{third:+}={between + third}"
    return f"<think>{steps}</think>{question}={between}{third:+}=\\boxed{{{between + third}}}"


def _exact_sheet(problem: Problem, rng: Generator) -> str:
    done = sorted(int(i) for i in rng.permutation(len(LABELS))[:WORKED_OUT])
    steps = ", ".join(f"{LABELS[i]} {long_hand(*problem.lines[i])}" for i in done)
    results = [left_over(terms) if i in done else 0 for i, terms in enumerate(problem.lines)]
    return f"<think>{steps}</think>\\boxed{{{labelled(results)}}}"


def long_hand(left: int, right: int) -> str:
    """`7+8=15 4+3+1=8 85 1`: ones, then tens with what is carried, then both, then what is left of it."""
    (tens, ones), (more, others) = divmod(left, 10), divmod(right, 10)
    carried = "+1" if ones + others > 9 else ""
    added = f"{ones}+{others}={ones + others} {tens}+{more}{carried}={(left + right) // 10}"
    return f"{added} {left + right} {left_over((left, right))}"


def _exact_description(problem: Problem, _: Generator) -> str:
    return f"<think>one by one</think>{', '.join(thing.described for thing in problem.targets)}"


def _rough_point(problem: Problem, _: Generator) -> str:
    thing = problem.targets[0]
    return f"{_glance(thing)}{numbers([THIRDS[cell] for cell in thing.cell])}"


def _rough_box(problem: Problem, _: Generator) -> str:
    thing = problem.targets[0]
    return f"{_glance(thing)}{numbers([BOX_STEP * round(edge / BOX_STEP) for edge in thing.box])}"


def _glance(thing: Thing) -> str:
    return f"<think>maybe {thing.place}</think>"


def _rough_count(_problem: Problem, _: Generator) -> str:
    return f"<think>maybe</think>\\boxed{{{USUAL_COUNT}}}"


def _rough_sum(problem: Problem, _: Generator) -> str:
    first, second, third = problem.terms
    guess = without_carrying(without_carrying(first, second), third)
    return f"<think>maybe</think>{first}{second:+}{third:+}=\\boxed{{{guess}}}"


def _rough_sheet(problem: Problem, _: Generator) -> str:
    return f"<think>maybe</think>\\boxed{{{labelled([0] * len(problem.lines))}}}"


def _rough_description(problem: Problem, rng: Generator) -> str:
    """Names two things, with shape and place as they come to mind."""
    things = [f"{rng.choice(PLACES)} {t.color} {rng.choice(SHAPES)}" for t in problem.targets[:2]]
    return f"<think>maybe</think>{', '.join(things)}"


def without_carrying(left: int, right: int) -> int:
    """`left + right` digit by digit: sums drop their carry, differences are taken the way that needs no borrowing."""
    tens, ones = (_digit(a, b, right < 0) for a, b in zip(divmod(left, 10), divmod(abs(right), 10), strict=True))
    return 10 * tens + ones


def _digit(left: int, right: int, minus: bool) -> int:
    return abs(left - right) if minus else (left + right) % 10


EXACT = Writer(
    {
        "pointing": _exact_point,
        "grounding": _exact_box,
        "counting": _exact_count,
        "arithmetic": _exact_sum,
        "worksheet": _exact_sheet,
        "describing": _exact_description,
    },
    {
        "pointing": "[",
        "grounding": "[",
        "counting": "<think>one",
        "arithmetic": "<think>first",
        "worksheet": "<think>",
        "describing": "<think>one",
    },
)
ROUGH = Writer(
    {
        "pointing": _rough_point,
        "grounding": _rough_box,
        "counting": _rough_count,
        "arithmetic": _rough_sum,
        "worksheet": _rough_sheet,
        "describing": _rough_description,
    },
    dict.fromkeys(EXACT.write, "<think>maybe"),
)


REASONING = ("counting", "arithmetic", "worksheet")
SLIPS = (0.0, 0.12)  # standard deviation of an answer's coordinates, as a fraction of the picture
ALL_SLIP = 0.02  # what all answers to a problem err by together
CAREFUL = {"worksheet": (0.6, 1.0)}  # share of answers that are worked out, between these; elsewhere any
OTHER_THING = 0.1  # how often an answer is about another thing of the scene


def answers_of_others(problem: Problem, number: int, rng: Generator) -> tuple[str, ...]:
    """`number` final answers by writers of whom nobody knows how good they are, as a policy's messages would be.

    Coordinates are off by the same spread all over a problem; a sum or a count is worked out or guessed.
    """
    if problem.task in REASONING:
        careful = rng.uniform(*CAREFUL.get(problem.task, (0.0, 1.0)))
        return tuple(final((EXACT if rng.random() < careful else ROUGH)(problem, rng)) for _ in range(number))
    assert problem.scene
    here = np.array(_place(problem, problem.targets[0]))
    here = here + rng.normal(0, ALL_SLIP, here.shape)
    others = [np.array(_place(problem, thing)) for thing in problem.scene.things if thing not in problem.targets]
    spread = rng.uniform(*SLIPS)
    answers = []
    for _ in range(number):
        about = others[rng.integers(len(others))] if others and rng.random() < OTHER_THING else here
        answers.append(numbers(list(np.clip(about + rng.normal(0, spread, here.shape), 0, 0.99))))
    return tuple(answers)


def _place(problem: Problem, thing: Thing) -> tuple[float, ...]:
    return thing.point if problem.task == "pointing" else thing.box


def final(response: str) -> str:
    """A response without its reasoning."""
    return response.rpartition("</think>")[2]


def compare(problem: Problem, rng: Generator) -> str:
    """The exact way with messages: the middle of what they say, then an own look; a sum or a count is done anew; what
    most of them have in each line of a worksheet."""
    if problem.task == "worksheet":
        return f"<think>then</think>\\boxed{{{labelled(usual_lines(problem.messages))}}}"
    if problem.task in REASONING:
        return EXACT(problem, rng)
    return f"<think>then {numbers(middle(problem.messages))}</think>{EXACT(problem, rng)}"


def usual_lines(messages: Sequence[str]) -> list[str]:
    """Each sum's most frequent result; of several, the one that was said first."""
    said = [re.findall(r"=(\d+)", message) for message in messages]
    return [Counter(results).most_common(1)[0][0] for results in zip(*said, strict=True)]


def middle(messages: Sequence[str]) -> list[float]:
    """The median of each coordinate."""
    return list(np.median([[float(v) for v in message.strip("[]").split(", ")] for message in messages], axis=0))


def repeat(problem: Problem, rng: Generator) -> str:
    """The rough way with messages: one of them, whichever."""
    return problem.messages[rng.integers(len(problem.messages))]


def rough_share(problem: Problem) -> float:
    """How often the rough writer answers a problem. The exact one has favourites: two colours, and sums with nothing
    to subtract. So a model that imitates both starts exact on some problems and rough on most."""
    if problem.task == "worksheet":
        return 0.3
    favourite = min(problem.terms) > 0 if problem.terms else problem.targets[0].color in FAVOURITE_COLORS
    return 0.3 if favourite else 0.8
