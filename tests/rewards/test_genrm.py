"""Tests the reward `genrm`: comparisons in both orders, and the value that follows from the grades."""

from pathlib import Path
from typing import Any

import pytest

from rewards import Invalid, Score
from tests.support.judge_server import Script, text_of
from tests.support.judging import RIGHT, blocks, judging, rollout, score

pytestmark = pytest.mark.usefixtures("hurried")


def grades(answer: float, reference: float, first_place: float = 0.0) -> Script:
    """Returns the script of a judge that gives these grades to the answer and the reference. The script adds
    `first_place` to the grade of the response that is shown first."""

    def script(request: dict[str, Any]) -> dict[str, Any]:
        shown = blocks(text_of(request))
        own = {"It is 42": answer, "The teacher says 42.": reference}
        return {
            "reasoning": "Because.",
            "grade_a": own[shown["response a"]] + first_place,
            "grade_b": own[shown["response b"]],
        }

    return script


def compared(script: Script, **params: Any) -> Score:
    with judging(script) as server:
        scored = score(
            "genrm",
            rollout("<think>hm</think>It is 42", reference="<think>6 * 7</think>The teacher says 42."),
            **params,
        )
    assert len(server.requests) == 2
    return scored


def test_a_win_probability_comes_from_the_difference_of_the_grades() -> None:
    # With grades 8 and 6 and the scale 2, the value is 1 / (1 + exp(-(8 - 6) / 2)) = 1 / (1 + 0.36788) = 0.73106. With
    # the scale 1, the value is 1 / (1 + exp(-2)) = 1 / (1 + 0.13534) = 0.88080.
    assert compared(grades(8, 6)).value == pytest.approx(0.73106, abs=1e-5)
    assert compared(grades(8, 6), scale=1).value == pytest.approx(0.88080, abs=1e-5)
    assert compared(grades(6, 8)).value == pytest.approx(1 - 0.73106, abs=1e-5)
    assert compared(grades(10, 0), scale=1e-6).value == 1.0


def test_the_linear_rule_spans_zero_to_one() -> None:
    values = [compared(grades(*pair), rule="linear").value for pair in ((10, 0), (0, 10), (7, 7), (8, 6))]
    assert values == [1.0, 0.0, 0.5, 0.6]
    with pytest.raises(ValueError, match="rule: linear has no scale"):
        score("genrm", rollout("x"), rule="linear", scale=3)


def test_both_orders_are_asked_and_a_preference_for_the_first_place_cancels_out() -> None:
    biased = compared(grades(5, 5, first_place=2))
    assert biased.value == 0.5
    assert biased.details == {"answer": 6, "reference": 6, "orders_agree": False, "reasons": ["Because.", "Because."]}
    assert compared(grades(8, 5, first_place=2)).details["orders_agree"] is True


def test_an_answer_longer_than_the_reference_loses_grades_only_with_length_control() -> None:
    # The reference has 20 characters. An answer of 40 characters has twice this length (one doubling), and an answer of
    # 80 characters has four times this length (two doublings).
    def value(answer: str, **params: Any) -> float:
        def script(request: dict[str, Any]) -> dict[str, Any]:
            return {"reasoning": "", "grade_a": 6, "grade_b": 6}

        with judging(script):
            return score("genrm", rollout(answer, reference="The teacher says 42."), rule="linear", **params).value

    assert value("x" * 40) == 0.5
    assert value("x" * 40, length_control=2) == pytest.approx(0.5 - 2 / 20)
    assert value("x" * 80, length_control=2) == pytest.approx(0.5 - 4 / 20)
    assert value("x" * 20, length_control=2) == value("4", length_control=2) == 0.5
    assert value("x" * 20 * 2**9, length_control=2) == pytest.approx(0.5 - 6 / 20)  # a grade cannot be below 0


def test_a_recipe_may_set_another_prompt_template(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ rules }}{{ question }}Which?{{ response_a }}{{ response_b }}")
    with judging(grades(8, 6)) as server:
        score("genrm", rollout("It is 42", reference="The teacher says 42."), template=str(own))
    assert all("Which?" in prompt for prompt in server.prompts)


def test_a_row_without_reference_is_invalid() -> None:
    for reference in (None, " ", "<think>nothing came of it</think>"):
        with judging([RIGHT]), pytest.raises(Invalid, match="row row-1 has no reference"):
            score("genrm", rollout("42", reference=reference))


@pytest.mark.parametrize("grade", [11, -1, "9 of 10", float("nan")])
def test_grades_outside_of_the_scale_are_no_verdict(grade: Any) -> None:
    with judging([{"reasoning": "", "grade_a": grade, "grade_b": 5}]), pytest.raises(Invalid, match="no Comparison"):
        score("genrm", rollout("42"))
