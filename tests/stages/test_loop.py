"""Tests one iteration with a scripted sampler and the real policy and critic. For example, the rewarded token must
become more likely."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.config import Config
from rl.types import Picture, Prompt, Rollout, Scored
from stages.loop import Clock, Diverged, LoopState, Services, check_rows, evaluate, ppo_iteration, sync
from tests.support import tiny
from tests.support.loop import BAD, GOOD, PROMPTS, Scores, Scripted, policy_of, scripted_services


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return scripted_services(tmp_path)


def with_options(services: Services, **options: Any) -> Services:
    config: Config = services.config.model_copy(update=options)
    return replace(services, config=config)


def likelihood(services: Services, token: int) -> float:
    logprobs = Scripted(policy_of(services)).rollout(PROMPTS[0], token).rollout_logprobs
    return float(torch.tensor(logprobs[0]).exp())


def test_the_policy_learns_to_say_the_rewarded_token(services: Services) -> None:
    before = likelihood(services, GOOD) / likelihood(services, BAD)
    for iteration in range(1, 4):
        ppo_iteration(iteration, PROMPTS, PROMPTS, services, LoopState(), Clock())
    assert likelihood(services, GOOD) / likelihood(services, BAD) > 10 * before


def test_an_iteration_returns_metrics_and_loads_the_new_weights(services: Services) -> None:
    clock = Clock()
    metrics, scored = ppo_iteration(1, PROMPTS, PROMPTS, services, LoopState(), clock)
    # Of the three rollouts of a prompt, only the second has the reward 1.
    assert metrics["reward/mean"] == pytest.approx(1 / 3)
    assert len(scored) == 12
    assert services.sampler.policy_step == 1
    assert {"time/rollout", "time/critic", "time/policy", "time/sync", "time/total"} <= clock.metrics().keys()
    json.dumps(metrics)


def test_after_repeated_non_finite_gradients_the_error_has_reason_and_samples(services: Services) -> None:
    policy = policy_of(services)
    with torch.no_grad():
        policy.trained["model.norm.weight"].fill_(float("nan"))
    policy.optimizer.ppo = policy.optimizer.ppo.model_copy(update={"max_skipped_steps": 1})
    with pytest.raises(Diverged, match="gradient norm is nan") as diverged:
        ppo_iteration(1, PROMPTS, PROMPTS, services, LoopState(), Clock())
    assert len(diverged.value.scored) == 12


def test_the_policy_does_not_change_in_critic_only_iterations(services: Services) -> None:
    ppo = services.config.ppo.model_copy(update={"critic_only_iterations": 1})
    services = with_options(services, ppo=ppo)
    before = likelihood(services, GOOD)
    metrics, _ = ppo_iteration(1, PROMPTS, PROMPTS, services, LoopState(), Clock())
    assert likelihood(services, GOOD) == before and "value/loss" in metrics
    ppo_iteration(2, PROMPTS, PROMPTS, services, LoopState(), Clock())
    assert likelihood(services, GOOD) != before


def test_engines_that_disagree_with_the_learner_stop_the_run_with_both_numbers(services: Services) -> None:
    services = replace(services, sampler=Scripted(policy_of(services), lie=0.3))
    with pytest.raises(RuntimeError, match=r"iteration 5 engine and learner differ by 0\.3000 nats .* is 0\.05"):
        sync(5, PROMPTS, services, LoopState())


def test_evaluation_is_greedy_per_task_and_leaves_invalid_samples_out(services: Services) -> None:
    def half(rollout: Rollout) -> Scored:
        return Scored(rollout, 1.0, "judge down" if rollout.prompt.id == "0" else None)

    services = replace(services, scorer=Scores(half))
    assert evaluate(PROMPTS, with_options(services, max_invalid_fraction=0.25)) == {"eval/t": 1.0}
    with pytest.raises(
        RuntimeError, match=r"1 of 4 samples are invalid.*max_invalid_fraction = 0.2(.|\n)*1 x judge down"
    ):
        evaluate(PROMPTS, with_options(services, max_invalid_fraction=0.2))


def test_an_iteration_with_too_many_invalid_samples_stops_before_it_learns_from_the_rest(services: Services) -> None:
    before = likelihood(services, GOOD)
    scorer = Scores(lambda rollout: Scored(rollout, 0.0, f"judge {rollout.prompt.id} away"))
    with pytest.raises(RuntimeError, match=r"12 of 12 samples are invalid(.|\n)*3 x judge 0 away"):
        ppo_iteration(1, PROMPTS, PROMPTS, replace(services, scorer=scorer), LoopState(), Clock())
    assert likelihood(services, GOOD) == before


def test_a_row_whose_picture_cannot_be_read_any_more_gets_invalid_samples_and_the_run_goes_on(
    services: Services, tmp_path: Path
) -> None:
    file = tmp_path / "one.png"
    tiny.image((8, 8)).save(file)
    shown = replace(PROMPTS[0], id="shown", images=(Picture.of(file),))
    services = with_options(services, max_invalid_fraction=0.25)
    assert services.pictures.unreadable([shown]) == {}
    file.unlink()
    metrics, scored = ppo_iteration(1, [shown, *PROMPTS[1:]], PROMPTS, services, LoopState(), Clock())
    assert metrics["reward/invalid_fraction"] == 0.25 and services.sampler.policy_step == 1
    lost = [s for s in scored if s.invalid]
    assert [s.rollout.prompt.id for s in lost] == ["shown"] * 3 and "one.png cannot be read" in str(lost[0].invalid)
    assert evaluate([shown, *PROMPTS[1:]], services) == {"eval/t": 1.0}
    with pytest.raises(RuntimeError, match=r"1 of 1 samples are invalid(.|\n)*one\.png cannot be read"):
        evaluate([shown], services)


def test_the_first_check_compares_the_smallest_the_largest_and_other_rows_with_pictures(services: Services) -> None:
    rows = [replace(PROMPTS[0], id=f"row {n}", images=(tiny.picture((8 + n, 8)),)) for n in range(20)]
    asked: list[str] = []

    class Recording(Scripted):
        def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
            asked.extend(prompt.id for prompt in prompts)
            return super().check([replace(prompt, images=()) for prompt in prompts], iteration)

    services = replace(services, sampler=Recording(policy_of(services)))
    assert check_rows(PROMPTS, services) == {} and asked == []
    few = services.config.rollout.model_copy(update={"logprob_check": 3})
    services = with_options(services, rollout=few)
    metrics = check_rows([*PROMPTS, *reversed(rows)], services)
    assert metrics["rollout/logprob_gap_rows"] == pytest.approx(0, abs=1e-4)
    assert asked == ["row 0", "row 10", "row 19"]


def test_a_difference_on_rows_with_pictures_stops_the_run_and_names_a_row(services: Services) -> None:
    class Lying(Scripted):
        def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
            return super().check([replace(prompt, images=()) for prompt in prompts], iteration)

    row = replace(PROMPTS[0], id="shown", images=(tiny.picture((8, 8)),))
    with pytest.raises(
        RuntimeError, match=r"on 1 rows with pictures.* differ by 0\.3000 nats .*most on row shown \(0\.3000\)"
    ):
        check_rows([row], replace(services, sampler=Lying(policy_of(services), lie=0.3)))


def test_a_picture_that_vanishes_during_sampling_makes_the_samples_of_its_row_invalid(
    services: Services, tmp_path: Path
) -> None:
    file = tmp_path / "one.png"
    tiny.image((8, 8)).save(file)
    shown = replace(PROMPTS[0], id="shown", images=(Picture.of(file),))

    class Removing(Scripted):
        def sample(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> Iterator[tuple[int, Rollout]]:
            plain = {prompt.id: replace(prompt, images=()) for prompt in prompts}
            for index, rollout in super().sample(list(plain.values()), per_prompt, iteration):
                yield index, replace(rollout, prompt=shown if rollout.prompt.id == "shown" else rollout.prompt)
            file.unlink()

    services = with_options(replace(services, sampler=Removing(policy_of(services))), max_invalid_fraction=0.25)
    metrics, scored = ppo_iteration(1, [shown, *PROMPTS[1:]], PROMPTS, services, LoopState(), Clock())
    assert metrics["reward/invalid_fraction"] == 0.25
    assert {s.rollout.prompt.id for s in scored if s.invalid} == {"shown"}
