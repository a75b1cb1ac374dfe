"""Tests the stage RLHF: which rows it accepts, and the metrics that show whether a judge's scores can be trusted."""

from dataclasses import replace
from typing import Any

import pytest

from rl.config import Preference
from rl.record.metrics import check
from rl.types import Prompt, Rollout, Scored
from stages.base import StageTools
from stages.rlhf import Rlhf, percentile, preference_metrics, rank_correlation, reference_problem
from tests.support.configs import config

ROW = Prompt("a", "chat", ({"role": "user", "content": "Hello?"},), reference="Hello!")


def rlhf(*penalties: str) -> Rlhf:
    unused: Any = None
    return Rlhf(StageTools(config(), unused, frozenset(penalties), unused))


def sample(answer: float, reference: float, *, agree: bool = True, tokens: int = 5, **penalties: float) -> Scored:
    """Returns a scored response. `answer` and `reference` are the grades that the judge gave to the response and to the
    reference. The score is a linear function of the difference between the two grades."""
    details: dict[str, Any] = {"answer": answer, "reference": reference, "orders_agree": agree}
    score = 0.5 + (answer - reference) / 20
    rollout = Rollout(ROW, "Hi", "stop", response_ids=(1,) * tokens)
    if penalties:
        return Scored(rollout, score, None, {"genrm": score, **penalties}, {"genrm": details})
    return Scored(rollout, score, None, {"genrm": score}, details)


def test_rows_must_have_a_reference_and_no_ground_truth() -> None:
    plain = Preference()
    assert reference_problem(ROW, plain) is None
    assert "no reference" in str(reference_problem(replace(ROW, reference=None), plain))
    both = replace(ROW, ground_truth="4")
    assert "preference.verifiable_tasks: [chat]" in str(reference_problem(both, plain))


def test_verifiable_rows_are_accepted_if_the_recipe_names_their_task() -> None:
    row = replace(ROW, task="sums", reference=None, ground_truth="4")
    assert reference_problem(row, Preference(verifiable_tasks=("sums",))) is None
    assert reference_problem(row, Preference(verifiable_tasks=("chat",))) is not None


def test_wins_count_one_and_ties_half() -> None:
    metrics = preference_metrics([sample(8, 6), sample(5, 6), sample(6, 6), sample(9, 2, agree=False)])
    assert metrics["genrm/win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert metrics["genrm/order_agreement"] == 0.75
    # The scores are 0.6, 0.45, 0.5 and 0.85.
    assert [metrics[f"genrm/score_p{tenth}"] for tenth in (10, 50, 90)] == pytest.approx([0.45, 0.5, 0.85])


def test_metrics_have_comparisons_and_the_rate_of_each_penalty() -> None:
    stage = rlhf("citation")
    metrics = stage.metrics([sample(8, 6, citation=1.0), sample(4, 6, citation=0.0)])
    check(metrics)
    assert metrics["genrm/win_rate"] == 0.5 and metrics["penalty/citation"] == 0.5
    assert stage.evaluation([sample(8, 6)]) == {"eval/win_rate": 1.0, "eval/order_agreement": 1.0}


def test_responses_that_cannot_be_compared_count_as_lost_and_without_comparisons_there_are_no_metrics() -> None:
    empty = Scored(Rollout(ROW, "", "stop"), 0.0, None, {"genrm": 0.0}, {"why": "an empty answer"})
    cut = Scored(Rollout(ROW, "So long", "length"), 0.0, details={"truncated": True})
    invalid = replace(sample(9, 1), invalid="its judge failed")
    assert preference_metrics([empty, invalid]) == {}
    assert rlhf().evaluation([empty, cut]) == {}
    assert preference_metrics([sample(8, 6), empty, cut, invalid])["genrm/win_rate"] == pytest.approx(1 / 3)
    sums = replace(cut, rollout=replace(cut.rollout, prompt=replace(ROW, task="sums")))
    # No sample of the task "sums" was compared with a reference, so the sample `sums` does not count as lost.
    assert preference_metrics([sample(8, 6), sums])["genrm/win_rate"] == 1


def test_a_judge_that_prefers_long_answers_shows_in_length_correlation() -> None:
    longer = [sample(n, 5, tokens=10 * n) for n in range(1, 9)]
    assert preference_metrics(longer)["genrm/length_correlation"] == pytest.approx(1)
    same_length = [sample(n, 5) for n in range(1, 9)]
    assert "genrm/length_correlation" not in preference_metrics(same_length)
    # The ranks are 1 2 3 and 3 1 2, and their differences are -2, 1 and 1. The correlation is
    # 1 - 6 * (4 + 1 + 1) / (3 * (3^2 - 1)) = -0.5.
    assert rank_correlation([1, 2, 3], [30, 10, 20]) == pytest.approx(-0.5)


def test_percentiles_are_values_of_the_list() -> None:
    assert [percentile([4, 1, 3, 2], percent) for percent in (10, 50, 90, 100)] == [1, 2, 4, 4]
