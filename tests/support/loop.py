"""A scripted sampler and scorer for tests of the loop. Policy and critic are real and run in this process."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rl.learner.batch import collate
from rl.learner.clients import CriticClient, PolicyClient
from rl.learner.critic import Critic
from rl.learner.features import FeatureStore
from rl.learner.options import LearnerOptions
from rl.learner.policy import Policy
from rl.model import hf_folder
from rl.remote import Local
from rl.types import Prompt, Rollout, Scored
from stages import STAGES
from stages.loop import Services
from tests.support.learner import config
from tests.support.models import text_model

PROMPTS = [Prompt(str(i), "t", ()) for i in range(4)]
GOOD, BAD = 20, 30


def policy_of(services: Services) -> Policy:
    """Returns the Policy object that the client `services.policy` calls."""
    return cast(Any, services.policy.remote).target


class Scripted:
    """Samples good and bad answers in turn. The logprobs of these answers are the policy's logprobs plus `lie` nats."""

    def __init__(self, policy: Policy, lie: float = 0.0) -> None:
        self.policy, self.lie, self.policy_step = policy, lie, 0

    def sample(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> Iterator[tuple[int, Rollout]]:
        """Yields all rollouts, the last rollout first."""
        tokens = [(p, GOOD if i % 2 else BAD) for p in prompts for i in range(per_prompt)]
        yield from reversed([(index, self.rollout(*pair)) for index, pair in enumerate(tokens)])

    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
        return [self.rollout(p, BAD) for p in prompts]

    def greedy(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Rollout]]:
        yield from reversed([(index, self.rollout(p, GOOD)) for index, p in enumerate(prompts)])

    def encodings(self) -> int:
        return 0

    def load(self, weights: Any, policy_step: int) -> None:
        self.policy_step = policy_step

    def rollout(self, prompt: Prompt, token: int) -> Rollout:
        made = Rollout(prompt, str(token), "stop", (10, 11, 12), (token,), (0.0,))
        logprob = float(self.policy.logprobs(collate([Scored(made, 0.0)]), {})[0, 0]) + self.lie
        return Rollout(prompt, str(token), "stop", (10, 11, 12), (token,), (logprob,), self.policy_step)


class Scores:
    """Scores each rollout when it arrives."""

    def __init__(self, score: Callable[[Rollout], Scored]) -> None:
        self.score, self.found = score, dict[int, Scored]()

    def begin(self, per_prompt: int) -> "Scores":
        return Scores(self.score)

    def add(self, place: int, rollout: Rollout) -> None:
        self.found[place] = self.score(rollout)

    def results(self) -> list[Scored]:
        return [self.found[place] for place in sorted(self.found)]


def right(rollout: Rollout) -> Scored:
    """Scores the good answer with 1 and the bad answer with 0."""
    return Scored(rollout, float(rollout.text == str(GOOD)), parts={"exact": 1.0})


def scripted_services(folder: Path) -> Services:
    """Returns services with a small text model. The model is saved in `folder`."""
    hf_folder.save(text_model(), folder)
    made = config(str(folder), policy_lr=1e-2, critic_lr=1e-2)
    options = LearnerOptions.of(made)
    policy, critic = Policy(str(folder), options), Critic(str(folder), options)
    clients = PolicyClient(Local(policy)), CriticClient(Local(critic))
    stage = STAGES["rlvr"](cast(Any, None))  # RLVR uses no tools
    return Services(made, Scripted(policy), Scores(right), *clients, FeatureStore([], 1), stage)
