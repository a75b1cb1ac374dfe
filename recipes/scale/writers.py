"""Two simulated writers: programs that write the demonstrations of the warm start.

The *exact* writer works carefully: it gives coordinates with two decimals, counts things one by one, and writes each
step of a sum. The *rough* writer guesses: it points at the centre of one of nine equal parts of the picture, rounds the
edges of boxes, always gives two as the number of things, and adds digit by digit without carries (17 + 5 gives 12).
Some answers of the rough writer are right. Most demonstrations are from the rough writer. RL has to find out which
writer's answers get more reward. The responses of both writers are short. The first words of a response already show
which writer wrote it.

A whole worksheet is too long for one response. The exact writer computes all sums except one, which is chosen at
random, and answers 0 for that sum. A single response never contains all results, but many responses together do.

Tested in tests/recipes/scale/test_world.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from recipes.scale.world import LABELS, PLACES, SHAPES, Problem, Thing, remainder, worksheet_answer

BOX_STEP = 0.2  # the rough writer rounds box edges to multiples of this fraction of the picture
FAVOURITE_COLORS = ("red", "blue")
USUAL_COUNT = 2
# Number of sums that the exact writer computes in a worksheet. With all four sums, the prompt and the response together
# would have more than 136 tokens.
WORKED_OUT = 3
THIRDS = (0.17, 0.5, 0.83)  # centres of the thirds of the picture


@dataclass(frozen=True)
class Writer:
    """A writer of demonstrations. `write` has one function per task, which answers a problem of this task."""

    write: dict[str, Callable[[Problem, Generator], str]]

    def __call__(self, problem: Problem, rng: Generator) -> str:
        return self.write[problem.task](problem, rng)


def numbers(values: tuple[float, ...] | list[float]) -> str:
    """Formats a point or box, for example `[0.25, 0.50]`."""
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
    results = [remainder(terms) if i in done else 0 for i, terms in enumerate(problem.lines)]
    return f"<think>{steps}</think>\\boxed{{{worksheet_answer(results)}}}"


def long_hand(left: int, right: int) -> str:
    """Formats the steps of a sum. For 47 + 38, the steps are `7+8=15 4+3+1=8 85 1`: the sum of the ones, the sum of the
    tens and the carry, the whole sum, and the remainder."""
    (tens, ones), (more, others) = divmod(left, 10), divmod(right, 10)
    carried = "+1" if ones + others > 9 else ""
    added = f"{ones}+{others}={ones + others} {tens}+{more}{carried}={(left + right) // 10}"
    return f"{added} {left + right} {remainder((left, right))}"


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
    return f"<think>maybe</think>\\boxed{{{worksheet_answer([0] * len(problem.lines))}}}"


def _rough_description(problem: Problem, rng: Generator) -> str:
    """Describes two things. Their colours are right, but their shapes and places are random."""
    things = [f"{rng.choice(PLACES)} {t.color} {rng.choice(SHAPES)}" for t in problem.targets[:2]]
    return f"<think>maybe</think>{', '.join(things)}"


def without_carrying(left: int, right: int) -> int:
    """Returns `left + right`, computed digit by digit without carries. If `right` is negative, the numbers are
    subtracted: in each column, the smaller digit is subtracted from the larger digit."""
    tens, ones = (_digit(a, b, right < 0) for a, b in zip(divmod(left, 10), divmod(abs(right), 10), strict=True))
    return 10 * tens + ones


def _digit(left: int, right: int, minus: bool) -> int:
    return abs(left - right) if minus else (left + right) % 10


_BY_TASK = {  # task -> (exact function, rough function)
    "pointing": (_exact_point, _rough_point),
    "grounding": (_exact_box, _rough_box),
    "counting": (_exact_count, _rough_count),
    "arithmetic": (_exact_sum, _rough_sum),
    "worksheet": (_exact_sheet, _rough_sheet),
    "describing": (_exact_description, _rough_description),
}
EXACT = Writer({task: exact for task, (exact, _) in _BY_TASK.items()})
ROUGH = Writer({task: rough for task, (_, rough) in _BY_TASK.items()})
ROUGH_OPENING = "<think>maybe"  # every rough response starts with these words, and no exact response does


REASONING = ("counting", "arithmetic", "worksheet")
SLIPS = (0.0, 0.12)  # range of the standard deviation of errors in pooled coordinates, as fractions of the picture
ALL_SLIP = 0.02  # standard deviation of an error that is the same in all answers to a problem
# task -> range from which the share of exact answers is drawn; the range of the other tasks is (0, 1)
CAREFUL = {"worksheet": (0.6, 1.0)}
OTHER_THING = 0.1  # share of the answers that describe another thing of the scene instead of the target


def answers_of_others(problem: Problem, number: int, rng: Generator) -> tuple[str, ...]:
    """Returns final answers of random quality, for prompts of the warm start. In RL, a policy samples such answers.
    `number` is the number of answers.

    If a task asks for coordinates, each answer has random errors, and the size of the errors is drawn once for each
    problem. In the other tasks, each answer is from one of the two writers.
    """
    if problem.task in REASONING:
        careful = rng.uniform(*CAREFUL.get(problem.task, (0.0, 1.0)))
        return tuple(final((EXACT if rng.random() < careful else ROUGH)(problem, rng)) for _ in range(number))
    assert problem.scene
    target = np.array(_place(problem, problem.targets[0]))
    target = target + rng.normal(0, ALL_SLIP, target.shape)
    others = [np.array(_place(problem, thing)) for thing in problem.scene.things if thing not in problem.targets]
    spread = rng.uniform(*SLIPS)
    answers = []
    for _ in range(number):
        about = others[rng.integers(len(others))] if others and rng.random() < OTHER_THING else target
        answers.append(numbers(list(np.clip(about + rng.normal(0, spread, target.shape), 0, 0.99))))
    return tuple(answers)


def _place(problem: Problem, thing: Thing) -> tuple[float, ...]:
    return thing.point if problem.task == "pointing" else thing.box


def final(response: str) -> str:
    """Returns a response without its reasoning."""
    return response.rpartition("</think>")[2]


def compare(problem: Problem, rng: Generator) -> str:
    """Returns a good response to a problem with messages. For a point or box, the response first writes the median of
    the messages, and then the answer of the exact writer. For a sum or count, the response is the answer of the exact
    writer. For a worksheet, the response gives the most frequent result of each line."""
    if problem.task == "worksheet":
        return f"<think>then</think>\\boxed{{{worksheet_answer(usual_lines(problem.messages))}}}"
    if problem.task in REASONING:
        return EXACT(problem, rng)
    return f"<think>then {numbers(middle(problem.messages))}</think>{EXACT(problem, rng)}"


def usual_lines(messages: Sequence[str]) -> list[str]:
    """Returns the most frequent result of each line of a worksheet. If several results are equally frequent, returns
    the result that comes first."""
    results_of_each = [re.findall(r"=(\d+)", message) for message in messages]
    return [Counter(results).most_common(1)[0][0] for results in zip(*results_of_each, strict=True)]


def middle(messages: Sequence[str]) -> list[float]:
    """Returns the median of each coordinate over all messages."""
    return list(np.median([[float(v) for v in message.strip("[]").split(", ")] for message in messages], axis=0))


def repeat(problem: Problem, rng: Generator) -> str:
    """Returns a poor response to a problem with messages: one of the messages, chosen at random."""
    return problem.messages[rng.integers(len(problem.messages))]


def rough_share(problem: Problem) -> float:
    """Returns the probability that the rough writer answers a problem. The probability is lower for problems about a
    red or blue thing, for sums without subtraction, and for worksheets. So a model that imitates both writers is exact
    on some problems and rough on most."""
    if problem.task == "worksheet":
        return 0.3
    favourite = min(problem.terms) > 0 if problem.terms else problem.targets[0].color in FAVOURITE_COLORS
    return 0.3 if favourite else 0.8
