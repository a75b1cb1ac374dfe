"""Figures of an evaluation: pass@1, pass@K, majority vote and PaCoRe, with confidence intervals. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rewards.voting import majority, vote
from rl.config import Config
from rl.types import Prompt, Scored
from rollout.pacore.rounds import PacoreResult
from stages.pacore import accepted

RESAMPLES, CONFIDENCE = 2000, 0.95
ALL = "all"  # the row over all tasks


@dataclass(frozen=True)
class Judged:
    """One row: what the model said about it, scored."""

    prompt: Prompt
    thought: PacoreResult
    attempts: Sequence[Scored]  # the first round
    answers: Sequence[Scored]  # the synthesis, once or several times; none where it was not asked for


@dataclass(frozen=True)
class Figure:
    """A mean over rows with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def figure(values: Sequence[float], seed: int = 0) -> Figure:
    """The mean and its 95% interval, by drawing rows anew (percentile bootstrap, Efron 1979)."""
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(array[draws].mean(axis=1), [tail, 100 - tail])
    return Figure(float(array.mean()), float(low), float(high))


def pass_at_one(row: Judged, config: Config) -> float:
    """Share of a row's attempts that are right."""
    return fmean(accepted(one, config.accept) for one in row.attempts)


def pass_at_k(row: Judged, config: Config) -> float:
    """Whether one of them is."""
    return float(any(accepted(one, config.accept) for one in row.attempts))


def majority_at_k(row: Judged, config: Config) -> float:
    """Whether the first attempt that says what most of them say is right; nobody's vote is wrong."""
    votes = [vote(one.rollout.answer) for one in row.attempts]
    winner = majority(votes)
    return float(winner is not None and accepted(row.attempts[votes.index(winner)], config.accept))


def pacore_at_k(row: Judged, config: Config) -> float:
    """Share of a row's syntheses that are right."""
    return fmean(accepted(one, config.accept) for one in row.answers)


@dataclass(frozen=True)
class ResultRow:
    """A way to answer, on one task or all of them."""

    task: str
    name: str
    accuracy: Figure
    reward: Figure | None  # of what has a reward of its own
    tokens: float  # per row, of everything it takes


def result_rows(rows: Sequence[Judged], config: Config, modes: Sequence[str]) -> list[ResultRow]:
    """The table, task by task and then over all rows."""
    tasks = sorted({row.prompt.task for row in rows})
    found = []
    for task in (*tasks, *([ALL] if len(tasks) > 1 else [])):
        found += _task_rows(task, [row for row in rows if task in (row.prompt.task, ALL)], config, modes)
    return found


def _task_rows(task: str, rows: Sequence[Judged], config: Config, modes: Sequence[str]) -> list[ResultRow]:
    count = len(rows[0].attempts)
    one = fmean(fmean(r.tokens for r in row.thought.rounds[0].replies) for row in rows)
    every = fmean(sum(r.tokens for r in row.thought.rounds[0].replies) for row in rows)
    found = []
    if "sere" in modes:
        rewards = figure([fmean(s.reward for s in row.attempts) for row in rows])
        found.append(ResultRow(task, "SeRe pass@1", figure([pass_at_one(row, config) for row in rows]), rewards, one))
    if "sere" in modes and count > 1:  # of a single attempt both would be the same
        best = figure([max(s.reward for s in row.attempts) for row in rows])
        found.append(
            ResultRow(task, f"SeRe pass@{count}", figure([pass_at_k(row, config) for row in rows]), best, every)
        )
    if "majority" in modes:
        found.append(
            ResultRow(task, f"majority@{count}", figure([majority_at_k(row, config) for row in rows]), None, every)
        )
    if "pacore" in modes:
        rewards = figure([fmean(s.reward for s in row.answers) for row in rows])
        tokens = fmean(_tokens(row.thought) for row in rows)
        found.append(
            ResultRow(task, f"PaCoRe@{count}", figure([pacore_at_k(row, config) for row in rows]), rewards, tokens)
        )
    return found


def _tokens(thought: PacoreResult) -> float:
    """Of one answer: all rounds, and one of the replies of the last."""
    *before, last = thought.rounds
    return sum(r.tokens for one in before for r in one.replies) + fmean(r.tokens for r in last.replies)
