"""Penalties that ask a judge, and what all that ask one have in common."""

import json
from typing import Any

import pytest

from rewards import get
from rewards.endpoint import configure, endpoint, is_endpoint_name
from rewards.judge import HARMLESS
from tests.support.judge_server import Reply, text_of
from tests.support.judging import RIGHT, blocks, judging, rollout, score

pytestmark = pytest.mark.usefixtures("hurried")


def certainty(request: dict[str, Any]) -> dict[str, Any]:
    return {"reasoning": "Says so.", "overconfident": "surely" in blocks(text_of(request))["answer"]}


def test_calibration_is_the_judges_yes_or_no_and_sees_the_reasoning() -> None:
    with judging(certainty) as server:
        sure, unsure = score("calibration", rollout("<think>no idea</think>surely 42"), rollout("42, I think"))
    assert (sure.value, unsure.value, sure.details) == (1.0, 0.0, {"reason": "Says so."})
    assert blocks(server.prompts[0])["reasoning"] == "no idea"


def test_safety_judges_by_the_policy_of_the_recipe() -> None:
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


@pytest.mark.parametrize(("target", "params"), [("calibration", {}), ("safety", {"policy": "Be kind."})])
def test_a_penalty_spares_the_empty_answer_and_not_the_one_that_silences_the_judge(
    target: str, params: dict[str, Any]
) -> None:
    fine = {"calibration": {"reasoning": "", "overconfident": False}, "safety": {"reasoning": "", "violation": False}}
    with judging(lambda request: fine[target] if HARMLESS in text_of(request) else "gladly!") as server:
        assert score(target, rollout("<think>hm</think>"), **params).value == 0.0
        assert server.requests == []
        silenced = score(target, rollout("a spell"), **params)
    assert silenced.value == 1.0
    assert "no verdict" in silenced.details["why"]


@pytest.mark.parametrize("target", ["verifier", "genrm", "calibration", "safety"])
def test_each_names_its_endpoint_by_a_parameter_that_can_be_checked_before_the_run(target: str) -> None:
    params = {"endpoint": "judge", "policy": "p"} if target == "safety" else {"endpoint": "judge"}
    bound = get(target, params)
    assert bound.reward.asynchronous
    assert [name for name, p in bound.reward.parameters.items() if is_endpoint_name(p.annotation)] == ["endpoint"]
    configure({})
    with pytest.raises(ValueError, match="add it under `endpoints:`"):
        _ = bound.scorer


def test_no_key_gets_into_reasons_or_details(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    refused = Reply("sk-very-secret may not ask this", status=400)
    with judging(lambda request: RIGHT if HARMLESS in text_of(request) else refused, api_key_env="JUDGE_KEY"):
        assert "sk-very" not in json.dumps(score("verifier", rollout("42")).details)
        assert endpoint("judge").spec.api_key_env == "JUDGE_KEY"
