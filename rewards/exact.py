"""Reward `exact`: 1.0 if the answer and the ground truth are the same text after normalisation, else 0.0."""

# ruff: noqa: RUF001  # punctuation and words of several scripts

from collections.abc import Iterator
from typing import Any

from rewards import Invalid, Rollout, Score, reward
from rewards.answer import WINDOW, bold, find, last_line
from rewards.text import normalised, plain_number


def _as_text(truth: Any) -> str:
    return plain_number(truth) if isinstance(truth, float) else str(truth)


@reward("exact", on_timeout="lowest", verifiable=_as_text)
def exact(rollout: Rollout) -> Score:
    """1.0 for equal texts, else 0.0. Letter case, the amount of white space, one final period, markdown and LaTeX
    around the text, and a backslash before signs such as % do not matter.

    The marked part of the answer is compared (see rewards/answer.py). If the ground truth is one line, the first line
    of the marked part counts too. If nothing is marked, the whole answer is compared, and also its last text in bold,
    or else its last line. The ground truth is text or a number. A ground truth with a mark, such as "<answer> 10
    </answer>", also equals its marked part. A number such as 5.0, but not the text "5.0", equals 5.
    """
    truth = rollout.prompt.ground_truth
    if not isinstance(truth, str | int | float) or not normalised(_as_text(truth)):
        raise Invalid(f"exact needs text or a number as ground truth; row {rollout.prompt.id} has {truth!r}")
    true = _as_text(truth)
    window = WINDOW + len(true)
    wanted = {normalised(true), normalised(str(truth))}
    if (own := find(true, window)) and own.text:
        wanted.add(normalised(own.text))
    found = find(rollout.answer, window)
    if found is None:
        return Score(0.0, {"why": "a long answer without a mark such as \\boxed{...} or Answer:"})
    given = set(map(normalised, _readings(rollout.answer, found.text, marked=found.mark is not None, true=true)))
    return Score(float(not wanted.isdisjoint(given)), {"answer": found.text[:200]})


def _readings(answer: str, found: str, marked: bool, true: str) -> Iterator[str]:
    """Yields the texts that may equal the ground truth."""
    yield found
    if len(answer) <= 2 * len(true) + 64:  # a ground truth may contain a mark itself
        yield answer
    line, _, rest = found.partition("\n")
    if marked and "\n" not in true and (":" in rest or "：" in rest or len(rest.split()) > 2 or len(rest) > 12):
        yield line  # an explanation follows
    if not marked:
        yield bold(answer[-WINDOW:]) or last_line(answer[-WINDOW:])
