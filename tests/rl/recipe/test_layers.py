"""Tests how a name or path is turned into the file of a recipe. tests/rl/recipe/test_resolve.py tests how layers are
merged."""

import json
from pathlib import Path

import pytest

from rewards.__main__ import main as rewards_main
from rl import evaluate
from rl.recipe.chain import is_chain, load_chain
from rl.recipe.errors import RecipeError
from rl.recipe.layers import SHIPPED, find_recipe, shipped_recipes
from rl.recipe.resolve import load
from rl.run import main as run_main
from stages.curate import main as curate_main

NAMES = ["curate", "pacore", "rlhf", "rlvr", "step3_vl"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_these_recipes_ship() -> None:
    assert list(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_found_from_anywhere_with_or_without_suffix_and_folder(name: str) -> None:
    for written in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
        assert find_recipe(written) == SHIPPED / f"{name}.yaml"


def test_a_file_has_precedence_if_it_is_given_as_a_path() -> None:
    Path("recipes").mkdir()
    for file in ("rlvr", "rlvr.yaml", "recipes/rlvr.yaml", "mine"):
        Path(file).write_text("seed: 1")
    assert find_recipe("rlvr") == SHIPPED / "rlvr.yaml"  # "rlvr" is a name, not a path
    for written in ("./rlvr", "rlvr.yaml", "recipes/rlvr.yaml", "mine", str(Path("rlvr.yaml").absolute())):
        assert find_recipe(written) == Path(written)


def test_a_path_in_another_folder_is_never_replaced_by_a_shipped_recipe() -> None:
    for written in ("other/rlvr.yaml", "./rlvr.yaml", "/recipes/rlvr.yaml", "rlvr.yml"):
        with pytest.raises(RecipeError, match=f"^no recipe {written}: there is no such file"):
            find_recipe(written)


def test_paths_in_a_recipe_are_relative_to_its_folder_and_never_to_the_clone() -> None:
    Path("mine").mkdir()
    Path("mine/rlvr.yaml").write_text("seed: 1")
    assert find_recipe("rlvr.yaml", folder=Path("mine")) == Path("mine/rlvr.yaml")
    assert find_recipe("rlhf.yaml", folder=Path("mine")) == SHIPPED / "rlhf.yaml"
    # A run folder has the recipes of its chain in recipes/. If such a file is lost, a shipped recipe must not be used
    # instead.
    with pytest.raises(RecipeError, match=r"^run/recipe.yaml: chain: no recipe recipes/rlvr.yaml"):
        find_recipe("recipes/rlvr.yaml", "run/recipe.yaml: chain: ", Path("mine"))


def test_the_message_for_an_unknown_name_has_the_shipped_recipes_and_the_nearest_name() -> None:
    Path("counting.yaml").write_text("base: rlvr")
    listed = "there is no such file, and the shipped recipes are curate, pacore, rlhf, rlvr, step3_vl"
    for written, advice in (
        ("rvlr", "; did you mean rlvr?"),
        ("rlfh.yaml", "; did you mean rlhf?"),
        ("counting", "; did you mean counting.yaml?"),
        ("sub/step3-vl", "; did you mean step3_vl?"),
        ("nowhere", ""),
    ):
        with pytest.raises(RecipeError) as caught:
            find_recipe(written)
        assert str(caught.value) == f"no recipe {written}: {listed}{advice}"


def test_a_users_recipe_can_name_shipped_recipes() -> None:
    rows = "data: {train: rows.jsonl}"
    for base in ("rlvr", "rlvr.yaml"):
        Path("mine.yaml").write_text(f"base: {base}\n{rows}")
        assert load(Path("mine.yaml")).config.iterations == 600
    Path("mine.yaml").write_text("chain: [rlvr, {curate: curate}, pacore.yaml]")
    assert is_chain(Path("mine.yaml"))
    chain = load_chain(Path("mine.yaml"), Path.cwd() / "run", profile="cpu")
    assert [step.name for step in chain.steps] == ["rlvr", "curate", "pacore"]


def test_every_command_takes_a_shipped_recipe_by_name(capsys: pytest.CaptureFixture) -> None:
    assert run_main(["rlvr", "--profile", "cpu", "--dry-run"]) == 0
    assert run_main(["step3_vl.yaml", "--profile", "cpu", "--dry-run"]) == 0
    assert curate_main(["curate", "--profile", "cpu", "--dry-run", "--out", "curated"]) == 0
    sample = json.loads((SHIPPED / "scale/data/heldout.jsonl").read_text().splitlines()[0])
    sample["messages"], sample["response"] = "Where is it?", json.dumps(sample["ground_truth"])
    Path("samples.jsonl").write_text(json.dumps(sample))
    assert rewards_main(["try", "rlvr:pointing", "samples.jsonl", "--workers", "1"]) == 0
    capsys.readouterr()
    args = evaluate.parser().parse_args(["--model", "m", "--data", "d.jsonl", "--recipe", "recipes/rlvr.yaml"])
    assert evaluate.config_of(args).rewards["math"][0].use == "math_verify"
    assert run_main(["rvlr", "--profile", "cpu"]) == curate_main(["rvlr", "--out", "curated"]) == 2
    assert capsys.readouterr().err.count("error: no recipe rvlr: there is no such file") == 2
