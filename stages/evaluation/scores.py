"""Computes the figures of an evaluation: pass@1, pass@K, majority vote and PaCoRe, with confidence intervals. All
functions are pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rewards.voting import majority, vote
from rl.config import Config
from rl.types import Prompt, Scored
from rollout.pacore.rounds import PacoreResult
from stages.pacore import is_accepted

RESAMPLES, CONFIDENCE = 2000, 0.95
ALL = "all"  # value of the column `task` in result lines about all tasks together


@dataclass(frozen=True)
class EvaluatedRow:
    """A data row, the model's answers to this row, and the scores of these answers."""

    prompt: Prompt
    result: PacoreResult
    attempts: Sequence[Scored]  # scored replies of the first round
    syntheses: Sequence[Scored]  # scored replies of the last round; empty without PaCoRe


@dataclass(frozen=True)
class Figure:
    """A mean over rows, and the confidence interval of this mean."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def figure(values: Sequence[float], seed: int = 0) -> Figure:
    """Returns the mean and its 95% confidence interval. The interval comes from resampling the rows (percentile
    bootstrap, Efron 1979)."""
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(array[draws].mean(axis=1), [tail, 100 - tail])
    return Figure(float(array.mean()), float(low), float(high))


def pass_at_one(row: EvaluatedRow, config: Config) -> float:
    """Returns the share of a row's attempts that are correct."""
    return fmean(is_accepted(scored, config.accept) for scored in row.attempts)


def pass_at_k(row: EvaluatedRow, config: Config) -> float:
    """Returns 1 if any attempt is correct, else 0."""
    return float(any(is_accepted(scored, config.accept) for scored in row.attempts))


def majority_at_k(row: EvaluatedRow, config: Config) -> float:
    """Returns 1 if the majority answer is correct, else 0. The score of the first attempt with this answer says whether
    the answer is correct. If there is no majority answer, the result is 0."""
    votes = [vote(scored.rollout.answer) for scored in row.attempts]
    winner = majority(votes)
    return float(winner is not None and is_accepted(row.attempts[votes.index(winner)], config.accept))


def pacore_at_k(row: EvaluatedRow, config: Config) -> float:
    """Returns the share of a row's syntheses that are correct."""
    return fmean(is_accepted(scored, config.accept) for scored in row.syntheses)


@dataclass(frozen=True)
class ResultRow:
    """One line of the results: the figures of one mode (for example "majority@16") on one task or on all tasks."""

    task: str
    name: str
    accuracy: Figure
    reward: Figure | None  # None for majority vote, which has no reward
    tokens: float  # number of sampled tokens per data row


def result_rows(rows: Sequence[EvaluatedRow], config: Config, modes: Sequence[str]) -> list[ResultRow]:
    """Returns the table of results: first the lines of each task, then, if there are several tasks, the lines for all
    tasks together."""
    tasks = sorted({row.prompt.task for row in rows})
    table = []
    for task in (*tasks, *([ALL] if len(tasks) > 1 else [])):
        table += _task_rows(task, [row for row in rows if task in (row.prompt.task, ALL)], config, modes)
    return table


def _task_rows(task: str, rows: Sequence[EvaluatedRow], config: Config, modes: Sequence[str]) -> list[ResultRow]:
    count = len(rows[0].attempts)
    one = fmean(fmean(r.tokens for r in row.result.rounds[0].replies) for row in rows)
    every = fmean(sum(r.tokens for r in row.result.rounds[0].replies) for row in rows)
    table = []
    if "sere" in modes:
        rewards = figure([fmean(s.reward for s in row.attempts) for row in rows])
        accuracy = figure([pass_at_one(row, config) for row in rows])
        table.append(ResultRow(task, "SeRe pass@1", accuracy, rewards, one))
    if "sere" in modes and count > 1:  # with one attempt, pass@K equals pass@1
        best = figure([max(s.reward for s in row.attempts) for row in rows])
        accuracy = figure([pass_at_k(row, config) for row in rows])
        table.append(ResultRow(task, f"SeRe pass@{count}", accuracy, best, every))
    if "majority" in modes:
        accuracy = figure([majority_at_k(row, config) for row in rows])
        table.append(ResultRow(task, f"majority@{count}", accuracy, None, every))
    if "pacore" in modes:
        rewards = figure([fmean(s.reward for s in row.syntheses) for row in rows])
        accuracy = figure([pacore_at_k(row, config) for row in rows])
        tokens = fmean(_tokens(row.result) for row in rows)
        table.append(ResultRow(task, f"PaCoRe@{count}", accuracy, rewards, tokens))
    return table


def _tokens(result: PacoreResult) -> float:
    """Returns the number of tokens that one final answer costs: the tokens of all replies of earlier rounds, plus the
    mean length of the replies of the last round."""
    *before, last = result.rounds
    return sum(r.tokens for one in before for r in one.replies) + fmean(r.tokens for r in last.replies)
