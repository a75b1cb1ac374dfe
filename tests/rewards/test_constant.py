"""Tests the reward `constant`."""

from rewards import get
from tests.support.reward_samples import rollout


def test_every_response_scores_one() -> None:
    assert [float(get("constant")(rollout(text, None))) for text in ("", "anything")] == [1.0, 1.0]
