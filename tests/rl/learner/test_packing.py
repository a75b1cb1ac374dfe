"""Tests packed rows: a packed row contains each prompt once, and gives the same logprobs as rows with one rollout each.
Every rank gets the same number of packed rows."""

import pytest
import torch

from rl.learner.batch import Group
from rl.learner.packing import balanced, pack, rows_of_rank
from rl.model.packed import PolicyModel
from tests.support.learner import group
from tests.support.models import IMAGE_TOKEN, step_vl


def test_a_packed_row_has_the_prompt_once_and_responses_continue_its_positions():
    (row,) = pack([group(3, 2, 1)], 100, None)
    assert row.token_ids.tolist() == [10, 11, 12, 20, 21, 21]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    # The prompt's last token predicts the first token of each response. Each later token of a response is predicted by
    # the previous token of this response.
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


def test_packed_groups_give_the_same_logprobs_as_one_rollout_per_row():
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


def test_other_pictures_in_the_prompt_change_the_logprob_of_every_response_token():
    model, g = step_vl(), group(3, 4, images=("a",))
    seen = [logprobs(model, pack([g], 50, IMAGE_TOKEN), {"a": torch.full((4, 32), v)})[0] for v in (0.0, 1.0)]
    assert ((seen[0] - seen[1]).abs() > 1e-2).all()


def test_every_rank_has_the_same_number_of_rows_and_every_response_counts_once():
    groups = [group(5, *[4] * 7, first_row=0), group(3, 2, 9, first_row=7), group(1, 1, first_row=9)]
    ranks = [rows_of_rank(groups, 20, None, rank=r, ranks=3, pairs_per_token=10.0) for r in range(3)]
    assert len({len(rows) for rows in ranks}) == 1
    counted = [i for rows in ranks for row in rows if row.counts for i in row.batch_rows.tolist()]
    assert sorted(counted) == list(range(10))


def test_a_rank_without_work_gets_a_row_that_does_not_count():
    rows = rows_of_rank([group(5, 4)], 20, None, rank=0, ranks=2, pairs_per_token=10.0)
    other = rows_of_rank([group(5, 4)], 20, None, rank=1, ranks=2, pairs_per_token=10.0)
    assert sorted([rows[0].counts, other[0].counts]) == [False, True]


def test_work_is_shared_evenly():
    # The method replaces the two largest numbers by their difference until one number remains: 8 - 7 = 1, 6 - 5 = 1,
    # 4 - 1 = 3, 3 - 1 = 2. The last number is the difference between the work of the two ranks:
    # (7 + 5 + 4) - (8 + 6) = 2.
    assert balanced([8, 7, 6, 5, 4], 2) == [[0, 2], [1, 3, 4]]
    assert balanced([], 2) == [[], []]
    work = torch.empty(200).log_normal_(0, 1, generator=torch.Generator().manual_seed(0)).tolist()
    sums = [sum(work[i] for i in share) for share in balanced(work, 8)]
    assert sorted(i for share in balanced(work, 8) for i in share) == list(range(200))
    assert max(sums) - min(sums) < 0.01 * max(sums)
