"""Offers the ground truths of rows to their rewards, to find those that a reward refuses before a run starts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rewards.registry import get
from rewards.running.runner import RewardRunner
from rl.config import RewardSpec
from rl.record.remembered import Remembered
from rl.types import Prompt, Rollout

JOBS_PER_WORKER = 200  # for fewer ground truths, another process would cost more time than it saves


def offered(tasks: Mapping[str, Sequence[RewardSpec]]) -> dict[str, list[RewardSpec]]:
    """Returns, for each task, the rewards that read the ground truth of a row and ask no endpoint, without their
    penalties."""
    kept: dict[str, list[RewardSpec]] = {}
    for task, specs in tasks.items():
        for spec in specs:
            bound = get(spec.use, spec.params)
            if bound.reward.needs == "ground_truth" and not bound.endpoints and not bound.reward.group:
                kept.setdefault(task, []).append(spec.model_copy(update={"penalties": (), "weight": 1.0}))
    return kept


def refusals(
    tasks: Mapping[str, Sequence[RewardSpec]], prompts: Sequence[Prompt], workers: int = 2
) -> list[str | None]:
    """Scores each ground truth as a response, with every reward of `offered`. Returns, for each prompt, why a reward
    cannot use the ground truth, or None. Ground truths that were accepted are remembered, so that the next call with
    the same rewards is quick."""
    reasons: list[str | None] = [None] * len(prompts)
    alone = {f"{task}#{number}": spec for task, specs in offered(tasks).items() for number, spec in enumerate(specs)}
    remembered = Remembered("accepted-truths.txt")
    known = remembered.read()
    jobs: list[tuple[int, str, Rollout]] = []
    for name, spec in alone.items():
        bound = get(spec.use, spec.params)
        as_text = bound.reward.truth_as_text or (lambda truth: "no answer")
        for place, one in enumerate(prompts):
            if one.task == name.rpartition("#")[0] and (key := _key(bound.version, one)) not in known:
                jobs.append((place, key, Rollout(replace(one, task=name), as_text(one.ground_truth))))
    if not jobs:
        return reasons
    workers = min(workers, 1 + len(jobs) // JOBS_PER_WORKER)
    with RewardRunner({name: [spec] for name, spec in alone.items()}, workers=workers) as runner:
        scored = runner.score([rollout for *_, rollout in jobs])
    for (place, _, _), one in zip(jobs, scored, strict=True):
        reasons[place] = reasons[place] or one.invalid
    remembered.add({key: "" for (_, key, _), one in zip(jobs, scored, strict=True) if one.invalid is None})
    return reasons


def _key(version: str, prompt: Prompt) -> str:
    """Returns a digest of everything that a reward reads of a row."""
    row = [version, prompt.ground_truth, prompt.meta, [picture.digest for picture in prompt.images]]
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")).hexdigest()
