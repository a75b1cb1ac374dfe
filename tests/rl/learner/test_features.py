"""Tests the cache of picture features. Each picture is encoded once. A picture that the cache has dropped is encoded
again, with the same result."""

import torch

from rl.learner.clients import EncoderClient
from rl.learner.features import FeatureStore
from rl.learner.policy import Policy
from rl.remote import Local
from tests.support.learner import PICTURES, options


def test_each_picture_is_encoded_once(folder):
    store = FeatureStore([EncoderClient(Local(Policy(folder, options()))) for _ in range(2)], limit_mib=1)
    for _ in range(3):
        found = store.of([*PICTURES, PICTURES[0]])
        store.trim(found)
    assert found.keys() == {p.digest for p in PICTURES}
    assert store.forwards == 2


def test_a_picture_that_was_dropped_gets_the_same_features_again(folder):
    store = FeatureStore([EncoderClient(Local(Policy(folder, options())))], limit_mib=0)
    first = store.of(PICTURES)
    store.trim(using=[PICTURES[0].digest])
    again = store.of(PICTURES)
    store.trim()
    assert all(torch.equal(first[p.digest].result(), again[p.digest].result()) for p in PICTURES)
    assert store.forwards == 3  # each of the two pictures was encoded once, then the dropped picture again
