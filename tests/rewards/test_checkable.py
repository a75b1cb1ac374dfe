"""Tests the row judge `checkable`: the texts that the judge sees, and the value for each verdict of the judge."""

from typing import Any

import pytest

from rewards import Invalid
from tests.support.judge_server import Reply, text_of
from tests.support.judging import judging, rollout, score
from tests.support.reward_samples import picture

pytestmark = pytest.mark.usefixtures("hurried")

VALID = {"reasoning": "One result.", "verdict": "valid"}
ROW = rollout("").prompt


def test_a_valid_row_scores_one_and_an_invalid_one_zero() -> None:
    def verdict(request: dict[str, Any]) -> dict[str, str]:
        return VALID if "42" in text_of(request) else {"reasoning": "Not 43.", "verdict": "invalid"}

    with judging(verdict) as server:
        valid, invalid = score("checkable", ROW, rollout("", truth="43").prompt)
    assert (valid.value, valid.details) == (1.0, {"reason": "One result."})
    assert (invalid.value, invalid.details) == (0.0, {"reason": "Not 43."})
    assert all("What is 6 times 7?" in prompt for prompt in server.prompts)


def test_passes_differ_by_their_seeds() -> None:
    seeds = set()
    for vote in range(3):
        with judging([VALID]) as server:
            score("checkable", ROW, vote=vote)
        seeds.add(server.requests[0]["seed"])
    assert len(seeds) == 3


def test_without_reasons_only_the_verdict_is_asked_for() -> None:
    with judging([{"verdict": "valid"}]):
        assert score("checkable", ROW, reasons=False).details == {}


@pytest.mark.parametrize("images", [False, True])
def test_pictures_are_shown_where_the_endpoint_takes_them(images: bool) -> None:
    with judging([VALID], images=images) as server:
        score("checkable", rollout("", images=(picture(4, 4),)).prompt)
    content = server.requests[0]["messages"][-1]["content"]
    assert (not isinstance(content, str)) == images
    assert "What is 6 times 7?" in text_of(server.requests[0])


def test_a_row_without_ground_truth_and_a_judge_without_verdict_are_invalid() -> None:
    with judging([]), pytest.raises(Invalid, match="row row-1 has no ground truth for the judge"):
        score("checkable", rollout("", truth=None).prompt)
    with judging([Reply("no verdict")]), pytest.raises(Invalid, match="no readable verdict on row row-1"):
        score("checkable", ROW)
