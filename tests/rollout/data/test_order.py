"""Tests the order of prompts: shuffled passes, and sources mixed by weight."""

from collections import Counter
from pathlib import Path

import pytest

from rl.recipe.resolve import RecipeError, load
from rl.types import Prompt
from rollout.data.order import MixedOrder, PromptOrder
from stages.plan import Plan, make_plan
from tests.support.command import ROOT
from tests.support.data_rows import CHAT, sums


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(n), "sums", tuple(CHAT)) for n in range(count)]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def test_each_row_comes_once_per_pass_even_if_batches_cross_the_end_of_a_pass() -> None:
    order = PromptOrder(prompts(7), seed=1)
    drawn = [one for start in range(0, 21, 3) for one in ids(order.prompts_at(start, 3))]  # 7 batches of 3 prompts
    for start in (0, 7, 14):
        assert sorted(drawn[start : start + 7]) == [str(n) for n in range(7)]
    assert drawn[:7] != drawn[7:14]


def test_a_new_order_can_start_at_any_position() -> None:
    drawn = ids(PromptOrder(prompts(5), seed=1).prompts_at(0, 23))
    for position in range(20):
        assert ids(PromptOrder(prompts(5), seed=1).prompts_at(position, 3)) == drawn[position : position + 3]


def test_the_order_depends_on_the_seed_and_not_on_the_file() -> None:
    forward, backward = prompts(6), prompts(6)[::-1]
    one = ids(PromptOrder(forward, seed=1).prompts_at(0, 6))
    assert one == ids(PromptOrder(backward, seed=1).prompts_at(0, 6))
    assert one != ids(PromptOrder(forward, seed=2).prompts_at(0, 6))


def test_more_prompts_than_rows_come_from_several_passes() -> None:
    drawn = ids(PromptOrder(prompts(2), seed=0).prompts_at(1, 5))
    assert len(drawn) == 5 and sorted(drawn[1:3]) == ["0", "1"]


def test_a_mixed_order_can_start_at_any_position_and_draws_all_rows() -> None:
    def order() -> MixedOrder:
        prompts = [[Prompt(f"{name}{n}", "t", ()) for n in range(count)] for name, count in (("a", 5), ("b", 4))]
        return MixedOrder([PromptOrder(part, seed=1) for part in prompts], [0.7, 0.3])

    drawn = [p.id for p in order().prompts_at(0, 30)]
    for position in range(25):
        assert [p.id for p in order().prompts_at(position, 5)] == drawn[position : position + 5]
    assert Counter(drawn)["a0"] >= 4 and set(drawn) == {*(f"a{n}" for n in range(5)), *(f"b{n}" for n in range(4))}


RECIPE = ROOT / "recipes/rlvr.yaml"


def plan(*overrides: str) -> Plan:
    return make_plan(load(RECIPE, profile="cpu", overrides=[*overrides, "data.eval=[]"]).config)


def test_weighted_sources_have_their_share_in_every_part_of_the_run(tmp_path: Path) -> None:
    many, few = sums(tmp_path, "many", 30), sums(tmp_path, "few", 3)
    made = plan(f"data.train=[{{path: {many}, weight: 3}}, {{path: {few}, weight: 1}}]")
    for start in (0, 8, 40):
        assert Counter(p.id[:3] for p in made.order.prompts_at(start, 8)) == {"man": 6, "few": 2}
    assert any("75% from" in line for line in made.lines())


def test_weights_for_some_sources_only_are_refused(tmp_path: Path) -> None:
    path = sums(tmp_path, "rows", 1)
    with pytest.raises(RecipeError, match="gives some of its sources a weight"):
        load(RECIPE, profile="cpu", overrides=[f"data.train=[{path}, {{path: {path}, weight: 1}}]"])
