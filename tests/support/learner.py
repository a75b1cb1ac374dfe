"""Makes pictures, options, groups and batches for tests of policy and critic with small models."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rl.config import Config
from rl.learner.batch import Batch, Group, collate
from rl.learner.options import LearnerOptions
from rl.learner.policy import Policy
from rl.types import Prompt, Rollout, Scored
from tests.support.models import IMAGE_TOKEN
from tests.support.tiny import picture

PICTURES = [picture((60, 60), seed) for seed in range(2)]


def config(model: str, **ppo: object) -> Config:
    """Returns a config with 4 prompts x 3 rollouts on the CPU in float32. `ppo` replaces options of the section ppo."""
    return Config.model_validate_json(
        json.dumps(
            {
                "stage": "rlvr",
                "iterations": 1,
                "prompts_per_iteration": 4,
                "rollouts_per_prompt": 3,
                "max_sequence_length": 64,
                "model": {"path": model, "dtype": "float32"},
                "data": {"train": ["x.jsonl"]},
                "rewards": {"t": {"use": "exact"}},
                "ppo": {"minibatches": 2, "critic_minibatches": 2, "policy_warmup": 0, "critic_warmup": 0, **ppo},
                "learner": {"device": "cpu", "token_budget": 4096},
            }
        )
    )


def options(ppo: Mapping[str, object] | None = None, **changed: Any) -> LearnerOptions:
    """Returns the learner's options from `config`. `ppo` replaces options of the section ppo.

    `changed` replaces options of the sections `model` and `learner`, and other fields of LearnerOptions.
    """
    made = LearnerOptions.of(config("unused", **(ppo or {})))
    sections: dict[str, Any] = {
        name: section.model_copy(update={key: changed.pop(key) for key in type(section).model_fields if key in changed})
        for name, section in (("model", made.model), ("learner", made.learner))
    }
    return replace(made, **sections, **changed)


def group(prompt: int, *responses: int, first_row: int = 0, images: tuple[str, ...] = ()) -> Group:
    """Returns a group. `prompt` is the number of text tokens in the prompt. `responses` has the number of text tokens
    of each response. The text tokens of the prompt have the ids 10, 11, 12, ... Response i has the ids 20 + i, 21 + i,
    ... Each image adds 4 image tokens at the start of the prompt."""
    ids = (IMAGE_TOKEN,) * 4 * len(images) + tuple(range(10, 10 + prompt))
    made = tuple(tuple(range(20 + i, 20 + i + n)) for i, n in enumerate(responses))
    return Group(ids, images, made, tuple(range(first_row, first_row + len(responses))))


def batch_of(policy: Policy) -> Batch:
    """Returns a batch of four prompts with three responses each. Three prompts have pictures. The engine's logprobs are
    near the policy's logprobs."""
    generator = torch.Generator().manual_seed(1)
    scored = []
    for number, images in enumerate([(), PICTURES[:1], PICTURES, PICTURES[1:]]):
        prompt_ids = (IMAGE_TOKEN,) * 4 * len(images) + tuple(range(10, 13 + number))
        prompt = Prompt(str(number), "t", (), tuple(images))
        for index in range(3):
            response = tuple(torch.randint(10, 60, (2 + number + index,), generator=generator).tolist())
            rollout = Rollout(prompt, "", "stop", prompt_ids, response, (0.0,) * len(response))
            scored.append(Scored(rollout, float(torch.rand((), generator=generator))))
    batch = collate(scored)
    logprobs = policy.logprobs(batch, features_of(policy))
    noise = 0.1 * torch.randn(logprobs.shape, generator=generator)
    return replace(batch, rollout_logprobs=(logprobs + noise) * batch.response_mask)


def features_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {p.digest: policy.encode(p) for p in PICTURES}
