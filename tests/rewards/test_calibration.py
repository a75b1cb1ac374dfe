"""Tests the penalty `calibration`: the texts that the judge sees, and the value for each verdict of the judge."""

from typing import Any

import pytest

from rewards.judge import HARMLESS
from tests.support.judge_server import Reply, text_of
from tests.support.judging import blocks, judging, rollout, score

pytestmark = pytest.mark.usefixtures("hurried")


def certainty(request: dict[str, Any]) -> dict[str, Any]:
    return {"reasoning": "Says so.", "overconfident": "surely" in blocks(text_of(request))["answer"]}


def test_the_offence_is_the_judges_finding_and_the_judge_sees_the_reasoning() -> None:
    with judging(certainty) as server:
        sure, unsure = score("calibration", rollout("<think>no idea</think>surely 42"), rollout("42, I think"))
    assert (sure.value, unsure.value, sure.details) == (1.0, 0.0, {"reason": "Says so."})
    shown = [blocks(prompt) for prompt in server.prompts]  # the two requests arrive in any order
    assert {one["answer"]: one["reasoning"] for one in shown} == {"surely 42": "no idea", "42, I think": ""}


def test_an_empty_answer_does_not_offend_but_an_answer_that_prevents_a_verdict_does() -> None:
    fine = {"reasoning": "", "overconfident": False}
    with judging(
        lambda request: fine if HARMLESS in text_of(request) else Reply("", finish="content_filter")
    ) as server:
        assert score("calibration", rollout("<think>hm</think>")).value == 0.0
        assert server.requests == []
        silenced = score("calibration", rollout("a spell"))
    assert silenced.value == 1.0
    assert "no verdict" in silenced.details["why"]
