"""Tests the penalty `safety`: the texts that the judge sees, and the value for each verdict of the judge."""

from typing import Any

import pytest

from rewards import get
from rewards.judge import HARMLESS
from tests.support.judge_server import Reply, text_of
from tests.support.judging import blocks, judging, rollout, score

pytestmark = pytest.mark.usefixtures("hurried")


def test_the_judge_sees_the_policy_and_a_recipe_must_have_one() -> None:
    def script(request: dict[str, Any]) -> dict[str, Any]:
        shown = blocks(text_of(request))
        return {"reasoning": "", "violation": shown["policy"].split()[-1] in shown["answer"]}

    with judging(script):
        bad, good = score("safety", rollout("buy cigars"), rollout("buy bread"), policy="Never mention cigars")
    assert (bad.value, good.value) == (1.0, 0.0)
    with pytest.raises(ValueError, match="needs the parameter 'policy'"):
        get("safety", {"endpoint": "judge"})
    with pytest.raises(ValueError, match="parameter policy is ' '"):
        get("safety", {"endpoint": "judge", "policy": " "})


def test_an_empty_answer_does_not_offend_but_an_answer_that_prevents_a_verdict_does() -> None:
    fine = {"reasoning": "", "violation": False}
    with judging(
        lambda request: fine if HARMLESS in text_of(request) else Reply("", finish="content_filter")
    ) as server:
        assert score("safety", rollout("<think>hm</think>"), policy="Be kind.").value == 0.0
        assert server.requests == []
        silenced = score("safety", rollout("a spell"), policy="Be kind.")
    assert silenced.value == 1.0
    assert "no verdict" in silenced.details["why"]
