"""Tests the registered stages, and options that do not fit the stage of a config."""

from typing import Any

import pytest

from rl.recipe import stages
from rl.recipe.stages import option_problems, registered
from tests.support.configs import config


def test_the_stages_of_the_report_are_registered_with_its_number_of_rollouts() -> None:
    assert list(registered()) == ["rlvr", "rlhf", "pacore"]
    sizes = ("iterations", "prompts_per_iteration", "rollouts_per_prompt")
    totals = [
        iterations * prompts * rollouts
        for iterations, prompts, rollouts in (
            [rules.defaults[size] for size in sizes] for rules in registered().values()
        )
    ]
    # The number of rollouts of a stage is iterations * prompts * rollouts per prompt. It is 600 * 512 * 16 in RLVR,
    # 300 * 512 * 8 in RLHF and 500 * 64 * 16 in PaCoRe. Together, the three stages have 6,656,000 rollouts.
    assert sum(totals) == 6_656_000


def test_an_option_of_another_stage_is_refused() -> None:
    named: dict[str, Any] = {"preference__verifiable_tasks": ["math"]}
    assert list(option_problems(config(stage="rlhf", **named))) == []
    (problem,) = option_problems(config(**named))
    assert problem.key == "preference.verifiable_tasks"
    assert "is for the stage rlhf, but the stage of this recipe is rlvr" in str(problem)


def test_the_message_without_an_installed_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "entry_points", lambda group: [])
    monkeypatch.setattr(stages, "_registries", stages._registries.__wrapped__)
    with pytest.raises(RuntimeError, match=r"no entry point of the group 'rl.stages' is installed: run make env"):
        registered()
