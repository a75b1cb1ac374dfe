"""One iteration with a scripted sampler and the real learner and critic: the rewarded token becomes likelier."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rl.config import Config
from rl.here import Here
from rl.learner.batch import collate
from rl.learner.critic import Critic
from rl.learner.features import FeatureStore
from rl.learner.options import LearnerOptions
from rl.learner.policy import Policy
from rl.model import hf_folder
from rl.types import Prompt, Rollout, Scored
from stages.loop import Clock, Diverged, Finished, Parts, evaluate, ppo_iteration, sync
from stages.rlvr import Rlvr
from tests.support.learner import config
from tests.support.models import text_model

PROMPTS = [Prompt(str(i), "t", ()) for i in range(4)]
GOOD, BAD = 20, 30


def inside(remote: Any) -> Any:
    """What a Here answers for."""
    return remote.target


class Scripted:
    """Alternates a good and a bad answer, with the policy's own logprobs, off by `lie` nats."""

    def __init__(self, policy: Policy, lie: float = 0.0) -> None:
        self.policy, self.lie, self.policy_step = policy, lie, 0

    def sample(
        self, prompts: Sequence[Prompt], per_prompt: int, iteration: int, finished: Finished = lambda i, r: None
    ) -> list[Rollout]:
        return self._all(
            [self._rollout(p, GOOD if i % 2 else BAD) for p in prompts for i in range(per_prompt)], finished
        )

    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
        return self.sample(prompts, 1, -iteration - 1)

    def greedy(self, prompts: Sequence[Prompt], finished: Finished = lambda i, r: None) -> list[Rollout]:
        return self._all([self._rollout(p, GOOD) for p in prompts], finished)

    def _all(self, rollouts: list[Rollout], finished: Finished) -> list[Rollout]:
        for place in reversed(range(len(rollouts))):
            finished(place, rollouts[place])
        return rollouts

    def encodings(self) -> int:
        return 0

    def load(self, weights: Any, policy_step: int) -> None:
        self.policy_step = policy_step

    def _rollout(self, prompt: Prompt, token: int) -> Rollout:
        made = Rollout(prompt, str(token), "stop", (10, 11, 12), (token,), (0.0,))
        logprob = float(self.policy.logprobs(collate([Scored(made, 0.0)]), {})[0, 0]) + self.lie
        return Rollout(prompt, str(token), "stop", (10, 11, 12), (token,), (logprob,), self.policy_step)


class Scores:
    """Scores each rollout when it comes."""

    def __init__(self, score: Callable[[Rollout], Scored]) -> None:
        self.score, self.found = score, dict[int, Scored]()

    def begin(self, per_prompt: int) -> "Scores":
        return Scores(self.score)

    def add(self, place: int, rollout: Rollout) -> None:
        self.found[place] = self.score(rollout)

    def results(self) -> list[Scored]:
        return [self.found[place] for place in sorted(self.found)]


def right(rollout: Rollout) -> Scored:
    return Scored(rollout, float(rollout.text == str(GOOD)), parts={"exact": 1.0})


@pytest.fixture
def parts(tmp_path) -> Parts:
    hf_folder.save(text_model(), tmp_path)
    made: Config = config(str(tmp_path), policy_lr=1e-2, critic_lr=1e-2)
    options = LearnerOptions.of(made)
    policy, critic = Policy(str(tmp_path), options), Critic(str(tmp_path), options)
    return Parts(made, Scripted(policy), Scores(right), Here(policy), Here(critic), FeatureStore([], 1), Rlvr())


def likelihood(parts: Parts, token: int) -> float:
    policy = inside(parts.policy)
    return float(torch.tensor(Scripted(policy)._rollout(PROMPTS[0], token).rollout_logprobs[0]).exp())


def test_the_policy_learns_to_say_the_rewarded_token(parts: Parts) -> None:
    before = likelihood(parts, GOOD) / likelihood(parts, BAD)
    for iteration in range(1, 4):
        ppo_iteration(iteration, PROMPTS, PROMPTS, parts, Clock(parts.phase))
    assert likelihood(parts, GOOD) / likelihood(parts, BAD) > 10 * before


def test_an_iteration_reports_and_hands_on_the_weights(parts: Parts) -> None:
    clock = Clock(parts.phase)
    metrics, scored = ppo_iteration(1, PROMPTS, PROMPTS, parts, clock)
    assert metrics["reward/mean"] == pytest.approx(1 / 3)  # of three rollouts per prompt the second is good
    assert len(scored) == 12
    assert isinstance(parts.sampler, Scripted) and parts.sampler.policy_step == 1
    assert {"time/rollout", "time/critic", "time/policy", "time/sync", "time/total"} <= clock.metrics().keys()
    json.dumps(metrics)


def test_gradients_that_stay_infinite_hand_the_samples_on_with_the_reason(parts: Parts) -> None:
    policy = inside(parts.policy)
    with torch.no_grad():
        policy.trained["model.norm.weight"].fill_(float("nan"))
    policy.optimizer.max_skipped = 1
    with pytest.raises(Diverged, match="gradient norm is nan") as diverged:
        ppo_iteration(1, PROMPTS, PROMPTS, parts, Clock(parts.phase))
    assert len(diverged.value.scored) == 12


def test_while_only_the_critic_learns_the_policy_stays_as_it_is(parts: Parts) -> None:
    parts.config = parts.config.model_copy(
        update={"ppo": parts.config.ppo.model_copy(update={"critic_only_iterations": 1})}
    )
    before = likelihood(parts, GOOD)
    metrics, _ = ppo_iteration(1, PROMPTS, PROMPTS, parts, Clock(parts.phase))
    assert likelihood(parts, GOOD) == before and "value/loss" in metrics
    ppo_iteration(2, PROMPTS, PROMPTS, parts, Clock(parts.phase))
    assert likelihood(parts, GOOD) != before


def test_engines_that_disagree_with_the_learner_stop_the_run_with_both_numbers(parts: Parts) -> None:
    parts.sampler = Scripted(inside(parts.policy), lie=0.3)
    with pytest.raises(RuntimeError, match=r"iteration 5 engine and learner differ by 0\.3000 nats .* is 0\.05"):
        sync(5, PROMPTS, parts)


def test_evaluation_is_greedy_per_task_and_leaves_invalid_samples_out(parts: Parts) -> None:
    def half(rollout: Rollout) -> Scored:
        return Scored(rollout, 1.0, "judge down" if rollout.prompt.id == "0" else None)

    parts.scorer = Scores(half)
    parts.config = parts.config.model_copy(update={"max_invalid_fraction": 0.25})
    assert evaluate(PROMPTS, parts) == {"eval/t": 1.0}
    parts.config = parts.config.model_copy(update={"max_invalid_fraction": 0.2})
    with pytest.raises(
        RuntimeError, match=r"1 of 4 samples are invalid.*max_invalid_fraction = 0.2(.|\n)*1 x judge down"
    ):
        evaluate(PROMPTS, parts)


def test_an_iteration_with_too_many_invalid_samples_stops_before_it_learns_from_the_rest(parts: Parts) -> None:
    before = likelihood(parts, GOOD)
    parts.scorer = Scores(lambda rollout: Scored(rollout, 0.0, f"judge {rollout.prompt.id} away"))
    with pytest.raises(RuntimeError, match=r"12 of 12 samples are invalid(.|\n)*3 x judge 0 away"):
        ppo_iteration(1, PROMPTS, PROMPTS, parts, Clock(parts.phase))
    assert likelihood(parts, GOOD) == before
