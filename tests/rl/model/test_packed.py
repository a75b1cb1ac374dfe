"""Tests the inputs of the decoder and the cost of attention. tests/rl/learner/test_packing.py compares logprobs."""

import pytest
import torch

from rl.learner.batch import Group
from rl.learner.packing import pack
from rl.model.packed import PolicyModel, embed, pairs_per_token
from tests.support.models import text_model


def test_features_fill_the_image_slots_and_a_sampled_image_token_is_embedded_as_a_word():
    words = torch.nn.Embedding(10, 2)
    ids, slots = torch.tensor([7, 7, 3, 7]), torch.tensor([True, True, False, False])
    features = [torch.full((1, 2), 5.0), torch.full((1, 2), 6.0)]
    inputs = embed(words, ids, slots, features)
    assert inputs[:2].tolist() == [[5, 5], [6, 6]]
    assert torch.equal(inputs[2:], words(ids[2:]))


def test_different_numbers_of_slots_and_features_are_refused():
    with pytest.raises(ValueError, match="2 image slots but the pictures give 1 features"):
        embed(torch.nn.Embedding(10, 2), torch.tensor([7, 7]), torch.tensor([True, True]), [torch.ones(1, 2)])


def test_the_cost_of_attention_by_hand():
    # The hidden size is 32, and the intermediate size is 48. Queries and outputs have 4 heads of 8 channels: 32
    # channels each. Keys and values have 2 heads of 8 channels: 16 channels each. The attention of a layer has
    # 32 * (32 + 32 + 16 + 16) = 3,072 weights, and the MLP has 3 * 32 * 48 = 4,608 weights. The sum is 7,680 weights. A
    # (query, key) pair costs as much as 2 weights per query channel: 2 * 32 = 64 weights.
    assert pairs_per_token(text_model().config) == 7680 / 64


def test_a_model_runs_under_autocast_with_results_near_those_in_float32():
    model = text_model()
    (row,) = pack([Group((1, 2, 3), (), ((4, 5), (6,)), (0, 1))], 50, None)
    decoder = PolicyModel(model.model, model.lm_head)
    expected, _ = decoder(row, {}, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = decoder(row, {}, 1.0)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=0.1, rtol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
