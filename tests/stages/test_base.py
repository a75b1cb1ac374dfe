"""Defines a fourth stage. Tests this stage in a plan, in the loop, in a chain and in an evaluation.
tests/runs/test_own_stage.py tests a stage from an installed package.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from rl.config import Config, CurationOptions
from rl.recipe.chain import load_chain
from rl.recipe.layers import SHIPPED
from rl.recipe.resolve import RecipeError, load
from rl.record.metrics import check as check_metrics
from rl.types import Prompt, Scored
from stages import STAGES
from stages.base import Stage, StageTools
from stages.loop import Clock, LoopState, evaluate, ppo_iteration
from stages.pipeline import before_and_after, check
from stages.plan import make_plan
from tests.support.loop import PROMPTS, scripted_services


class Reversed(Stage):
    """A stage that reverses the order of the rows in an iteration, and rejects rows whose id ends in 7."""

    name = "reversed"
    defaults: ClassVar[Mapping[str, Any]] = {
        "iterations": 3,
        "prompts_per_iteration": 4,
        "rollouts_per_prompt": 3,
        "max_sequence_length": 128,
        "ppo": {"minibatches": 1, "critic_minibatches": 1},
    }
    own_options = ("preference.verifiable_tasks",)
    own_metrics: ClassVar[Mapping[str, str]] = {
        "reversed/first": "Id of the first row.",
        "eval/rows": "Held-out rows.",
    }
    selection = "has an id that does not end in 7"
    comparable_evaluation = False

    @classmethod
    def selects(cls, prompt: Prompt, config: Config) -> bool:
        return not prompt.id.endswith("7")

    @classmethod
    def plan_lines(cls, config: Config, left_out: int = 0) -> list[str]:
        return [f"order      reversed; {left_out} rows left out"]

    @classmethod
    def curation_problem(cls, config: Config, curation: CurationOptions) -> str | None:
        return "reversed rows cannot be curated" if curation.block == 7 else None

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        return list(prompts)[::-1]

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {"reversed/first": float(scored[0].rollout.prompt.id)}

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {"eval/rows": float(len(scored))}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "reversed", Reversed)


def recipe(folder: Path) -> Path:
    """Writes a recipe for the fourth stage. Its base is the shipped recipe rlvr."""
    file = folder / "mine.yaml"
    file.write_text("base: rlvr\nstage: reversed\n")
    return file


def test_the_new_stages_defaults_and_rows_make_a_plan(tmp_path: Path) -> None:
    resolved = load(recipe(tmp_path), profile="cpu", overrides=["data.eval=[]"])
    assert resolved.provenance["stage"].endswith("mine.yaml")
    plan = make_plan(resolved.config)
    assert plan.stage is Reversed
    assert not any(prompt.id.endswith("7") for prompt in plan.train) and plan.left_out > 0
    assert f"order      reversed; {plan.left_out} rows left out" in plan.lines()


def test_the_loop_uses_the_new_stages_prompts_and_reports_its_metrics(tmp_path: Path) -> None:
    services = scripted_services(tmp_path)
    tools = StageTools(services.config, cast(Any, None), frozenset(), cast(Any, None))
    services = replace(services, stage=Reversed(tools))
    metrics, _ = ppo_iteration(1, PROMPTS, PROMPTS, services, LoopState(), Clock())
    assert metrics["reversed/first"] == 3.0
    check_metrics({"reversed/first": 3.0, "iteration": 1, "stage": "reversed"})
    with pytest.raises(ValueError, match="metric 'reversed/last' has no entry"):
        check_metrics({"reversed/last": 3.0})
    assert evaluate(PROMPTS, services)["eval/rows"] == 4.0


def test_a_chain_can_have_the_new_stage_as_a_step_with_its_own_section(tmp_path: Path) -> None:
    recipe(tmp_path)
    file = tmp_path / "chain.yaml"
    file.write_text("chain: [rlvr, {curate: curate}, mine.yaml]\nreversed: {ppo: {lam: 0.5}}\n")
    chain = load_chain(file, tmp_path / "run", profile="cpu")
    assert [step.name for step in chain.steps] == ["rlvr", "curate", "reversed"]
    assert [step.resolved.config.ppo.lam for step in chain.steps] == [1.0, 1.0, 0.5]
    assert any(line.startswith("order      reversed") for line in check(chain))
    with pytest.raises(RecipeError, match="reversed rows cannot be curated"):
        load_chain(file, tmp_path / "run", profile="cpu", overrides=["curate.block=7"])


def test_the_new_stages_evaluations_count_where_they_can_be_compared() -> None:
    def line(iteration: int, value: float) -> dict[str, Any]:
        return {"iteration": iteration, "eval/sums": value}

    rewards, _ = before_and_after({"rlvr": [line(0, 0.1), line(9, 0.5)], "reversed": [line(0, 0.9), line(9, 0.6)]})
    assert rewards == {"start": {"sums": 0.1}, "rlvr": {"sums": 0.5}, "reversed": {"sums": 0.6}}


def test_an_option_of_the_new_stage_is_refused_by_others(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"preference\.verifiable_tasks is for the stage"):
        load(SHIPPED / "rlvr.yaml", profile="cpu", overrides=["preference.verifiable_tasks=[arithmetic]"])
    recipe(tmp_path)
    load(tmp_path / "mine.yaml", profile="cpu", overrides=["preference.verifiable_tasks=[arithmetic]"])
