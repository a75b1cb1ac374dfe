"""Tests that scored rollouts become a batch with groups and minibatches."""

import pytest
import torch

from rl.learner.batch import Batch, collate, minibatches
from rl.types import Prompt, Rollout, Scored
from tests.support.learner import group


def scored(prompt: str, response: int, reward: float = 1.0, invalid: str | None = None) -> Scored:
    rollout = Rollout(Prompt(prompt, "t", ()), "", "stop", (1, 2), tuple(range(response)), (-0.5,) * response)
    return Scored(rollout, reward, invalid)


def test_invalid_samples_are_left_out_and_the_last_token_gets_the_reward():
    batch = collate([scored("a", 3, 0.5), scored("a", 2, 9.0, invalid="judge down"), scored("b", 1, 0.25)])
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.rewards.tolist() == [[0, 0, 0.5], [0.25, 0, 0]]
    assert [g.rows for g in batch.groups] == [(0,), (1,)]


def test_an_iteration_without_a_valid_sample_is_an_error():
    with pytest.raises(ValueError, match="no sample of this iteration is valid"):
        collate([scored("a", 3, invalid="crashed")])


def test_a_batch_with_tensors_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"Batch.rewards has shape \(1, 2\), but response_mask has \(1, 3\)"):
        Batch((), torch.ones(1, 3).bool(), torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1).bool())


def test_minibatches_share_the_responses_evenly_and_keep_groups_whole():
    groups = [group(2, 1, 1, 1, 1, first_row=4 * i) for i in range(8)]
    parts = minibatches(groups, 4, "seed")
    assert [sum(len(g.rows) for g in part) for part in parts] == [8, 8, 8, 8]
    assert sorted(row for part in parts for g in part for row in g.rows) == list(range(32))
    assert parts == minibatches(groups, 4, "seed") != minibatches(groups, 4, "other")


def test_groups_are_split_in_half_if_there_are_more_minibatches_than_groups():
    parts = minibatches([group(2, 1, 1, 1, 1)], 4, "seed")
    assert [len(part) for part in parts] == [1, 1, 1, 1]


def test_pairs_counts_the_token_pairs_of_attention():
    made = group(3, 2, 1)
    assert made.pairs == (1 + 2 + 3) + (4 + 5) + 4
