"""Tests the row judge `relevant`: grades, and the texts and pictures that the judge sees."""

import pytest

from tests.support.judging import judging, rollout, score
from tests.support.reward_samples import picture

pytestmark = pytest.mark.usefixtures("hurried")


def test_the_grade_of_question_and_pictures_becomes_a_share_of_ten() -> None:
    with judging([{"reasoning": "Needed.", "grade": 7}], images=True) as server:
        graded = score("relevant", rollout("", images=(picture(4, 4),)).prompt)
    assert (graded.value, graded.details) == (0.7, {"reason": "Needed."})
    shown = server.requests[0]["messages"][-1]["content"]
    assert [part["type"] for part in shown] == ["image_url", "text"]
    assert "What is 6 times 7?" in server.prompts[0] and "42" not in server.prompts[0]


def test_without_reasons_only_the_grade_is_asked_for() -> None:
    with judging([{"grade": 10}], images=True):
        assert score("relevant", rollout("", images=(picture(4, 4),)).prompt, reasons=False).details == {}


def test_a_judge_that_sees_no_pictures_is_refused() -> None:
    with judging([]), pytest.raises(ValueError, match="gets no pictures; the row judge relevant needs `images: true`"):
        score("relevant", rollout("").prompt)
