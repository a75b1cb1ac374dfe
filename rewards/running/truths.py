"""Offers the ground truths of rows to their rewards, to find those that a reward refuses before a run starts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rewards.registry import get
from rewards.running.runner import RewardRunner
from rl.config import RewardSpec
from rl.types import Prompt, Rollout


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
    cannot use the ground truth, or None."""
    reasons: list[str | None] = [None] * len(prompts)
    alone = {f"{task}#{number}": spec for task, specs in offered(tasks).items() for number, spec in enumerate(specs)}
    jobs: list[tuple[int, Rollout]] = []
    for name, spec in alone.items():
        as_text = get(spec.use, spec.params).reward.truth_as_text or (lambda truth: "no answer")
        own = [(place, one) for place, one in enumerate(prompts) if one.task == name.rpartition("#")[0]]
        jobs += [(place, Rollout(replace(one, task=name), as_text(one.ground_truth))) for place, one in own]
    if not jobs:
        return reasons
    with RewardRunner({name: [spec] for name, spec in alone.items()}, workers=workers) as runner:
        for (place, _), scored in zip(jobs, runner.score([rollout for _, rollout in jobs]), strict=True):
            reasons[place] = reasons[place] or scored.invalid
    return reasons
