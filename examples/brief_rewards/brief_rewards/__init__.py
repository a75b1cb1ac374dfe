"""Rewards for answers that are right and brief. This package is an example. Recipes find the package's rewards through
its entry points.

It has one reward of each kind: a function, a class that loads something once, a reward that compares the responses to
one prompt, and a penalty. The names that recipes use are in pyproject.toml.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rewards import Invalid, Rollout, Score, penalty, reward
from rewards.answer import marked_answer
from rewards.text import normalised

Share = Annotated[float, Field(gt=0, le=1)]


@reward("right_and_brief", on_timeout="lowest", verifiable=str)
def right_and_brief(rollout: Rollout, limit: Annotated[int, Field(gt=0)] = 200) -> Score:
    """1.0 for a right response of at most `limit` characters, limit / length for a longer right response, 0.0 for a
    wrong response."""
    length = len(rollout.text)
    if not is_right(rollout):
        return Score(0.0, {"why": "wrong", "characters": length})
    return Score(min(1.0, limit / max(length, 1)), {"characters": length})


@reward("no_filler", on_timeout="lowest")
class NoFiller:
    """The value falls linearly from 1.0 (no filler words) to 0.0 (the share of filler words is `share` or more).

    An empty text gets 0.0. The filler words and phrases are in filler.txt. Letter case does not matter.
    """

    def __init__(self, share: Share = 0.2):
        self.share = share

    def setup(self) -> None:
        lines = Path(__file__).with_name("filler.txt").read_text(encoding="utf-8").splitlines()
        longest_first = sorted(filter(None, lines), key=len, reverse=True)
        self.filler = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def __call__(self, rollout: Rollout) -> Score:
        words = len(rollout.text.split())
        if not words:
            return Score(0.0, {"why": "an empty text"})
        found = self.filler.findall(rollout.text)
        filling = sum(len(one.split()) for one in found)
        return Score(max(0.0, 1 - filling / words / self.share), {"words": words, "filler": found[:20]})


@reward("shortest_right", group=True, on_timeout="lowest")
def shortest_right(rollouts: list[Rollout], least: Annotated[float, Field(ge=0, le=1)] = 0.5) -> list[Score]:
    """1.0 for the shortest right response to a prompt, `least` for the longest right response. Between these two, the
    value falls linearly with the rank.

    The rank of a right response is 1 + the number of shorter right responses. Wrong and truncated responses have no
    rank and get 0.0.
    """
    lengths = [len(one.text) if one.finish == "stop" and is_right(one) else None for one in rollouts]
    right = [length for length in lengths if length is not None]
    return [_ranked(length, right, least) for length in lengths]


def _ranked(length: int | None, right: list[int], least: float) -> Score:
    if length is None:
        return Score(0.0, {"why": "wrong or truncated"})
    shorter = sum(other < length for other in right)
    return Score(1 - (1 - least) * shorter / max(len(right) - 1, 1), {"rank": shorter + 1, "right": len(right)})


@penalty("repeated_lines", on_timeout="lowest")
def repeated_lines(rollout: Rollout) -> Score:
    """The share of the non-empty lines that repeat an earlier line."""
    lines = [" ".join(line.split()) for line in rollout.text.splitlines() if line.strip()]
    repeated = len(lines) - len(set(lines))
    return Score(repeated / max(len(lines), 1), {"lines": len(lines), "repeated": repeated})


def is_right(rollout: Rollout) -> bool:
    """True if the result in the answer equals the ground truth, after normalisation.

    The result is the last `\\boxed{...}`, else the text after the last "Answer:", else the whole answer if it is short.
    The ground truth must be text or a number; otherwise Invalid is raised.
    """
    truth = rollout.prompt.ground_truth
    if not isinstance(truth, str | int | float):
        raise Invalid(f"row {rollout.prompt.id} has the ground truth {truth!r}; it must be text or a number")
    found = marked_answer(rollout.answer)
    return found is not None and normalised(found) == normalised(str(truth))
