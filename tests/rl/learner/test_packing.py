"""Groups packed into rows: the prompt once, the same numbers as one rollout per row."""

import pytest
import torch

from rl.learner.batch import Batch, Group, collate, minibatches
from rl.learner.packing import pack
from rl.model.packed import PolicyModel
from rl.types import Prompt, Rollout, Scored
from tests.support.models import IMAGE_TOKEN, step_vl


def group(prompt: int, *responses: int, first_row: int = 0, images: tuple[str, ...] = ()) -> Group:
    """Token ids count up from 10; `images` put one picture's 4 tokens at the start of the prompt each."""
    ids = (IMAGE_TOKEN,) * 4 * len(images) + tuple(range(10, 10 + prompt))
    made = tuple(tuple(range(20 + i, 20 + i + n)) for i, n in enumerate(responses))
    return Group(ids, images, made, tuple(range(first_row, first_row + len(responses))))


def scored(prompt: str, response: int, reward: float = 1.0, invalid: str | None = None) -> Scored:
    rollout = Rollout(Prompt(prompt, "t", ()), "", "stop", (1, 2), tuple(range(response)), (-0.5,) * response)
    return Scored(rollout, reward, invalid)


def test_a_packed_row_has_the_prompt_once_and_positions_that_continue_it():
    (row,) = pack([group(3, 2, 1)], 100, None)
    assert row.token_ids.tolist() == [10, 11, 12, 20, 21, 21]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    # a response's first token is predicted by the prompt's last, every other by its neighbour
    assert row.before.tolist() == [2, 3, 2]
    assert row.last.tolist() == [4, 5]


def test_rows_stay_within_the_budget_and_hold_every_response_once():
    groups = [group(5, *[4] * 7, first_row=0), group(3, 2, 9, first_row=7), group(1, 1, first_row=9)]
    rows = pack(groups, 20, None)
    assert all(len(row.token_ids) <= 20 for row in rows)
    assert sorted(index for row in rows for index in row.batch_rows.tolist()) == list(range(10))


def test_a_sequence_over_the_budget_is_refused_with_its_sizes():
    with pytest.raises(ValueError, match=r"prompt of 5 tokens with a response of 6 .* 10"):
        pack([group(5, 6)], 10, None)


def test_packed_groups_give_the_logprobs_of_one_rollout_per_row():
    model = step_vl()
    features = {"a": torch.randn(4, 32), "b": torch.randn(4, 32)}
    groups = [
        group(6, 5, 3, 7, images=("a", "b")),
        group(4, 2, first_row=3),
        group(2, 6, 1, first_row=4, images=("b",)),
    ]
    together = logprobs(model, pack(groups, 200, IMAGE_TOKEN), features)
    singles = [_single(g, i) for g in groups for i in range(len(g.rows))]
    alone = {k: v for g in singles for k, v in logprobs(model, pack([g], 200, IMAGE_TOKEN), features).items()}
    assert together.keys() == alone.keys()
    for row, values in alone.items():
        torch.testing.assert_close(together[row], values, atol=1e-5, rtol=0)


def _single(g: Group, index: int) -> Group:
    return Group(g.prompt_ids, g.images, (g.responses[index],), (g.rows[index],))


def logprobs(model, rows, features) -> dict[int, torch.Tensor]:
    out = {}
    for row in rows:
        values, _ = PolicyModel(model.model, model.lm_head)(row, features, 1.0)
        for local, index in enumerate(row.batch_rows.tolist()):
            out[index] = values[row.response == local].detach()
    return out


def test_pictures_in_the_prompt_change_what_every_response_token_is_worth():
    model, g = step_vl(), group(3, 4, images=("a",))
    seen = [logprobs(model, pack([g], 50, IMAGE_TOKEN), {"a": torch.full((4, 32), v)})[0] for v in (0.0, 1.0)]
    assert ((seen[0] - seen[1]).abs() > 1e-2).all()


def test_minibatches_share_the_responses_evenly_and_keep_groups_whole():
    groups = [group(2, 1, 1, 1, 1, first_row=4 * i) for i in range(8)]
    parts = minibatches(groups, 4, "seed")
    assert [sum(len(g.rows) for g in part) for part in parts] == [8, 8, 8, 8]
    assert sorted(row for part in parts for g in part for row in g.rows) == list(range(32))
    assert parts == minibatches(groups, 4, "seed") != minibatches(groups, 4, "other")


def test_fewer_groups_than_minibatches_are_halved_rather_than_skipping_a_step():
    parts = minibatches([group(2, 1, 1, 1, 1)], 4, "seed")
    assert [len(part) for part in parts] == [1, 1, 1, 1]


def test_invalid_samples_are_left_out_and_the_reward_sits_on_the_last_token():
    batch = collate([scored("a", 3, 0.5), scored("a", 2, 9.0, invalid="judge down"), scored("b", 1, 0.25)])
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.rewards.tolist() == [[0, 0, 0.5], [0.25, 0, 0]]
    assert [g.rows for g in batch.groups] == [(0,), (1,)]


def test_an_iteration_without_a_valid_sample_says_so():
    with pytest.raises(ValueError, match="no sample of this iteration is valid"):
        collate([scored("a", 3, invalid="crashed")])


def test_a_batch_whose_tensors_disagree_is_refused():
    with pytest.raises(ValueError, match=r"Batch.rewards is \(1, 2\) but response_mask is \(1, 3\)"):
        Batch((), torch.ones(1, 3).bool(), torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1).bool())
