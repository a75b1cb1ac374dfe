"""Tests partial rollouts: in which iteration each group is complete, and whether every sampled token is used once, with
the right logprob and policy step."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rl.config import Config
from rl.remote import Ready
from rl.types import Completion, Prompt, Request, Rollout
from rollout.partial import PartialRollouts
from rollout.pool import EnginePool, in_order
from tests.support.engines import PROMPTS, Letters, in_turns
from tests.support.learner import config


class Counting:
    """An engine that answers row i with the tokens 1, 2, 3, ..., lengths[i]. The logprob of each token is -1 times
    the number of weight updates so far."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.step = lengths, 0
        self.asked: list[Request] = []

    def load(self, weights: Any, step: int) -> Ready[None]:
        return Ready(None)

    def encodings(self) -> Ready[int]:
        return Ready(0)

    def stream(self, requests: Sequence[Request]) -> list[list[tuple[int, Completion]]]:
        self.asked += requests
        return [[(i, self._answer(request))] for i, request in enumerate(requests)][::-1]

    def _answer(self, request: Request) -> Completion:
        row, *done = request.prompt_ids
        left = self.lengths[row] - len(done)
        ids = tuple(range(len(done) + 1, len(done) + 1 + min(left, request.max_tokens)))
        finish = "stop" if left <= request.max_tokens else "length"
        return Completion(request.prompt_ids, ids, (-float(self.step),) * len(ids), finish)


def partial(lengths: Sequence[int], *, wanted: int, chunk: int, room: int = 50) -> tuple[PartialRollouts, Counting]:
    engine, chat = Counting(lengths), Letters()
    made: Any = chat
    pool = EnginePool([engine], in_turns, made, max_sequence_length=1 + room, temperature=1.0, seed=0)
    return PartialRollouts(pool, wanted=wanted, chunk=chunk), engine


def learned(sampler: PartialRollouts, engine: Counting) -> None:
    """Loads new weights into the engine, as a run does after each iteration."""
    engine.step += 1
    sampler.load("weights", engine.step)


def rows(rollouts: Sequence[Rollout]) -> list[int]:
    return [int(rollout.prompt.id) for rollout in rollouts]


def test_an_iteration_ends_when_enough_groups_are_complete_and_the_others_continue_in_the_next() -> None:
    sampler, engine = partial([3, 9, 4, 2, 30], wanted=2, chunk=4)
    assert rows(in_order(sampler.sample(PROMPTS[:3], 1, 1))) == [0, 2]
    learned(sampler, engine)
    assert rows(in_order(sampler.sample(PROMPTS[3:], 1, 2))) == [3, 1]


def test_every_token_keeps_the_logprob_and_the_step_of_the_weights_that_sampled_it() -> None:
    sampler, engine = partial([3, 9, 4, 2, 30], wanted=2, chunk=4)
    in_order(sampler.sample(PROMPTS[:3], 1, 1))
    learned(sampler, engine)
    _, long = in_order(sampler.sample(PROMPTS[3:], 1, 2))
    assert long.response_ids == tuple(range(1, 10))
    assert long.rollout_logprobs == (0.0,) * 4 + (-1.0,) * 5
    assert (long.policy_step, long.pieces, long.prompt_ids, long.finish) == (0, ((0, 4), (1, 5)), (1,), "stop")


def test_a_group_is_yielded_when_all_its_responses_are_finished_and_no_token_is_sampled_twice() -> None:
    sampler, engine = partial([4, 40, 40], wanted=1, chunk=8)
    assert [index for index, _ in sampler.sample(PROMPTS[:3], 2, 1)] == [0, 1]
    assert [request.max_tokens for request in engine.asked] == [8] * 6
    engine.asked.clear()
    in_order(sampler.sample([], 2, 2))
    assert {request.prompt_ids[0] for request in engine.asked} == {1, 2}
    assert [len(request.prompt_ids) for request in engine.asked[:4]] == [9, 9, 9, 9]


def test_a_response_sampled_in_pieces_ends_at_the_maximum_sequence_length() -> None:
    sampler, engine = partial([100, 100], wanted=2, chunk=8, room=20)
    found = in_order(sampler.sample(PROMPTS[:2], 1, 1))
    assert [(len(rollout.response_ids), rollout.finish) for rollout in found] == [(20, "length")] * 2
    assert [request.max_tokens for request in engine.asked[::2]] == [8, 8, 4]


def test_each_piece_has_its_own_seed_and_the_first_piece_has_the_seed_of_a_whole_response() -> None:
    sampler, engine = partial([20, 20], wanted=2, chunk=8)
    in_order(sampler.sample(PROMPTS[:2], 1, 1))
    assert len({request.seed for request in engine.asked}) == 6
    first = [request.seed for request in engine.asked[:2]]
    engine.asked.clear()
    in_order(sampler.pool.sample(PROMPTS[:2], 1, 1))
    assert [request.seed for request in engine.asked] == first


def test_a_run_resumed_from_a_checkpoint_continues_unfinished_groups_identically() -> None:
    found = []
    for broken_off in (False, True):
        sampler, engine = partial([3, 9, 4, 2, 30], wanted=2, chunk=4)
        in_order(sampler.sample(PROMPTS[:3], 1, 1))
        if broken_off:
            left = json.loads(json.dumps(sampler.unfinished(1)))
            sampler, engine = partial([3, 9, 4, 2, 30], wanted=2, chunk=4)
            sampler.resume(1, left, PROMPTS)
        learned(sampler, engine)
        found.append((in_order(sampler.sample(PROMPTS[3:], 1, 2)), sampler.unfinished(2)))
    assert found[0] == found[1]


def test_a_checkpoint_has_the_groups_of_its_own_iteration_even_if_the_next_is_already_sampled() -> None:
    sampler, _ = partial([3, 9, 4, 2, 30], wanted=2, chunk=4)
    in_order(sampler.sample(PROMPTS[:3], 1, 1))
    left = sampler.unfinished(1)
    in_order(sampler.sample(PROMPTS[3:], 1, 2))
    assert [record["id"] for record in left] == ["1"]
    assert sampler.unfinished(1) == left


def test_the_error_for_a_missing_row_names_the_row() -> None:
    sampler, _ = partial([3, 9, 4], wanted=2, chunk=4)
    in_order(sampler.sample(PROMPTS[:3], 1, 1))
    with pytest.raises(ValueError, match=r"responses to row '1' are unfinished, but data\.train does not have this"):
        sampler.resume(1, sampler.unfinished(1), [Prompt("7", "t", ())])


@pytest.mark.parametrize("share, expected", [
    (None, [range(4), range(4, 8), range(8, 12)]),
    (0.3, [range(6), range(6, 10), range(10, 14)]),
])  # fmt: skip
def test_the_first_iteration_starts_the_extra_prompts_and_no_prompt_is_skipped(share, expected) -> None:
    made = config("x").model_dump()
    made["rollout"]["partial"] = None if share is None else {"extra_prompts": share}
    asked = Config.model_validate(made)
    assert [asked.prompt_range(i) for i in (1, 2, 3)] == expected


def test_a_group_whose_picture_was_lost_is_complete_and_says_why() -> None:
    sampler, engine = partial([3, 9], wanted=1, chunk=4)
    answer = engine._answer
    engine._answer = lambda request: (  # pyrefly: ignore[bad-assignment]
        Completion((), (), (), "stop", "picture lost") if request.prompt_ids[0] == 1 else answer(request)
    )
    (rollout,) = in_order(sampler.sample(PROMPTS[1:2], 1, 1))
    assert (rollout.unusable, rollout.response_ids, rollout.finish) == ("picture lost", (), "stop")
