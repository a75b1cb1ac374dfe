"""Tests the pool of engines: which engine gets which request, the seeds, the order of results, and dead engines."""

from collections.abc import Sequence
from typing import Any

import pytest

from rl.remote import Ready
from rl.stop import SourceDied, WorkerDied
from rl.types import Completion, Request
from rollout.pool import EnginePool, in_order, seed_of
from tests.support.engines import PROMPTS, Echo, Letters, in_turns, pool


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rollouts_are_returned_in_the_order_of_the_prompts(workers: int) -> None:
    made, _ = pool(workers)
    rollouts = in_order(made.sample(PROMPTS, 2, iteration=1))
    assert [r.text for r in rollouts] == [f"answer to {i}" for i in range(5) for _ in range(2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_rollout_is_yielded_with_its_index_as_soon_as_it_arrives(workers: int) -> None:
    pairs = list(pool(workers)[0].sample(PROMPTS, 2, iteration=1))
    assert sorted(index for index, _ in pairs) == list(range(10))
    assert {index: rollout.prompt.id for index, rollout in pairs} == {index: str(index // 2) for index in range(10)}
    assert pairs[0][0] != 0  # these engines answer their last request first


def test_every_sample_has_its_own_seed_which_does_not_depend_on_the_number_of_engines() -> None:
    seeds = [[r.response_ids[1] for r in in_order(pool(n)[0].sample(PROMPTS, 3, iteration=2))] for n in (1, 2)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 15
    assert seeds[0] != [r.response_ids[1] for r in in_order(pool(1)[0].sample(PROMPTS, 3, iteration=3))]


def test_prompts_are_distributed_to_engines_by_a_fixed_rule() -> None:
    made, engines = pool(2)
    in_order(made.sample(PROMPTS, 1, iteration=1))
    assert [[r.prompt_ids[0] for r in e.asked] for e in engines] == [[0, 2, 4], [1, 3]]


def test_the_prompt_and_its_response_share_the_sequence_length() -> None:
    made, engines = pool(1, length=10)
    in_order(made.sample(PROMPTS[:1], 1, iteration=1))
    assert engines[0].asked[0].max_tokens == 9


def test_a_check_samples_one_short_response_to_each_prompt_with_its_own_seed() -> None:
    made, engines = pool(1, length=100)
    made.check_tokens = 7
    assert len(made.check(PROMPTS, 3)) == 5
    assert {request.max_tokens for request in engines[0].asked} == {7}
    checked = {request.seed for request in engines[0].asked}
    in_order(made.sample(PROMPTS, 1, 3))
    assert not checked & {request.seed for request in engines[0].asked[5:]}


def test_greedy_sends_one_request_per_prompt_at_temperature_zero() -> None:
    made, engines = pool(1)
    assert len(in_order(made.greedy(PROMPTS))) == 5
    assert {r.temperature for r in engines[0].asked} == {0.0}


def test_loaded_weights_reach_every_engine_and_mark_the_rollouts() -> None:
    made, engines = pool(2)
    made.load("weights", 7)
    assert [e.loaded for e in engines] == [[("weights", 7)]] * 2
    assert in_order(made.sample(PROMPTS[:1], 1, iteration=8))[0].policy_step == 7


def test_a_prompt_that_fills_the_sequence_is_refused_by_name() -> None:
    made, _ = pool(1, length=1)
    with pytest.raises(ValueError, match=r"row 0 has 1 tokens .* no room for a response in a sequence of 1"):
        made.sample(PROMPTS[:1], 1, iteration=1)


class Mortal(Echo):
    """An engine that sends two answers at a time. `answers` is the number of answers after which the engine dies. If
    `answers` is 0, the engine also dies in `load`. If `answers` is None, the engine does not die."""

    def __init__(self, answers: int | None = None) -> None:
        super().__init__()
        self.answers = answers

    def load(self, weights: Any, step: int) -> Ready[None]:
        return Dead(WorkerDied("gone")) if self.answers == 0 else super().load(weights, step)

    def stream(self, requests: Sequence[Request]) -> list:
        steps = super().stream(requests)
        return steps if self.answers is None else [*steps[: self.answers // 2], WorkerDied("gone")]


class Dead(Ready):
    """The Future that a dead engine returns. Its method `result` raises an error."""

    def result(self, patience: float | None = None) -> Any:
        raise self.value


def mortal_pool(*answers: int | None) -> tuple[EnginePool, list[Mortal], list[int]]:
    """Returns a pool of engines of the class Mortal, a list of all engines that the pool has used so far, and a list of
    the indices of the replaced engines."""
    engines = [Mortal(one) for one in answers]
    replaced: list[int] = []
    chat: Any = Letters()

    def another(number: int, died: WorkerDied) -> Mortal:
        replaced.append(number)
        engines.append(Mortal())
        return engines[-1]

    made = EnginePool(engines[:], in_turns, chat, max_sequence_length=10, temperature=0.7, seed=3, replacement=another)
    return made, engines, replaced


def test_unanswered_requests_of_a_dead_engine_go_to_another_with_the_same_weights_and_seeds() -> None:
    expected = in_order(pool(2)[0].sample(PROMPTS, 2, iteration=1))
    made, engines, replaced = mortal_pool(None, 2)
    made.load("weights", 4)
    pairs = list(made.sample(PROMPTS, 2, iteration=1))
    assert [rollout.response_ids for rollout in in_order(pairs)] == [rollout.response_ids for rollout in expected]
    assert sorted(index for index, _ in pairs) == list(range(10))  # every response is yielded once
    assert (replaced, made.replaced) == ([1], 1)
    assert engines[2].loaded == [("weights", 4)]
    assert len(engines[2].asked) == 2  # the dead engine had answered two of its four requests


def test_an_engine_that_dies_while_it_loads_weights_is_replaced() -> None:
    made, engines, replaced = mortal_pool(None, 0)
    made.load("weights", 4)
    assert (replaced, engines[2].loaded) == ([1], [("weights", 4)])
    assert in_order(made.sample(PROMPTS, 1, iteration=1))[0].policy_step == 4


def test_an_engine_is_not_replaced_if_the_policy_dies_before_sending_the_weights() -> None:
    made, engines, replaced = mortal_pool(None)
    engines[0].load = lambda weights, step: Dead(SourceDied("the policy is gone"))
    with pytest.raises(SourceDied, match="the policy is gone"):
        made.load("weights", 4)
    assert replaced == []


def test_without_a_replacement_a_dead_engine_ends_the_run() -> None:
    made, *_ = mortal_pool(2)
    made.replacement = None
    with pytest.raises(WorkerDied, match="gone"):
        in_order(made.sample(PROMPTS, 2, iteration=1))


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(0, 1, 2, 3) == seed_of(0, 1, 2, 3) < 2**31
    assert seed_of(0, 1, 23) != seed_of(0, 12, 3)


def test_a_response_with_a_token_for_pictures_is_unusable() -> None:
    sampler, _ = pool(1)
    sampler.chat.never_sampled = frozenset({7})
    good, bad = (Completion((1,), ids, (-0.5, -0.5), "stop") for ids in ((5, 6), (5, 7)))
    assert sampler.rollout(PROMPTS[0], good).unusable == ""
    assert sampler.rollout(PROMPTS[0], bad).unusable.startswith("the engine sampled the tokens [7]")
