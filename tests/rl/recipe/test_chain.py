"""Tests recipes of chains: the links between steps, the options of single stages, and the chains that are refused."""

from pathlib import Path

import pytest

from rl.recipe.chain import Chain, is_chain, load_chain, saved_chain
from rl.recipe.resolve import RecipeError

MINE = """
chain:
  - rlvr.yaml
  - curate: curate.yaml
  - pacore.yaml
seed: 5
pacore: {iterations: 7}
"""
STAGE = """
model: {{path: ./start}}
data: {{train: rows.jsonl}}
rewards: {{math: {{use: math_verify}}}}
stage: {stage}
"""


@pytest.fixture(autouse=True)
def _recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, stage in (("rlvr", "rlvr"), ("rlhf", "rlhf"), ("curate", "rlvr"), ("pacore", "pacore")):
        Path(f"{name}.yaml").write_text(STAGE.format(stage=stage))
    Path("pacore.yaml").write_text(STAGE.format(stage="pacore") + "learner: {token_budget: 65536}\n")


def mine(*overrides: str, text: str = MINE, first: str | None = None) -> Chain:
    Path("mine.yaml").write_text(text)
    return load_chain(Path("mine.yaml"), Path.cwd() / "run", overrides=overrides, first=first)


def refusal(*overrides: str, text: str = MINE, first: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        mine(*overrides, text=text, first=first)
    return str(caught.value)


def test_every_stage_starts_from_the_policy_and_critic_of_the_previous_stage() -> None:
    chain = mine()
    rlvr, curate, pacore = (step.resolved.config for step in chain.steps)
    assert [step.name for step in chain.steps] == ["rlvr", "curate", "pacore"]
    assert rlvr.model.path == str(Path("start").absolute()) and rlvr.model.critic is None
    assert curate.model.path == pacore.model.path == str(chain.folder / "rlvr/policy")
    assert pacore.model.critic == chain.folder / "rlvr/checkpoints/000600/critic"
    assert pacore.data.train[0].path == str(chain.folder / "curate/rows") and pacore.data.on_bad_row == "skip"
    assert curate.data.train[0].path == str(Path("rows.jsonl").absolute())


def test_an_option_applies_to_all_stages_or_in_a_section_to_one_stage() -> None:
    chain = mine("rlvr.ppo.policy_lr=1e-3", "rollouts_per_prompt=2")
    rlvr, _, pacore = (step.resolved.config for step in chain.steps)
    assert (rlvr.seed, pacore.seed, pacore.iterations, rlvr.iterations) == (5, 5, 7, 600)
    assert (rlvr.ppo.policy_lr, pacore.ppo.policy_lr) == (1e-3, 2e-6)
    assert rlvr.rollouts_per_prompt == pacore.rollouts_per_prompt == 2
    assert chain.steps[2].resolved.provenance["iterations"] == "mine.yaml, pacore"


def test_a_stage_can_begin_with_a_new_critic() -> None:
    assert mine("pacore.model.critic=null").steps[2].resolved.config.model.critic is None


def test_a_chain_that_begins_with_a_later_stage_curates_its_rows_first() -> None:
    chain = mine("model.path=./other", first="pacore")
    assert [step.name for step in chain.steps] == ["curate", "pacore"]
    curate, pacore = (step.resolved.config for step in chain.steps)
    assert curate.model.path == pacore.model.path == str(Path("other").absolute())
    assert pacore.model.critic is None and pacore.data.train[0].path == str(chain.folder / "curate/rows")


@pytest.mark.parametrize("first", [None, "pacore"])
@pytest.mark.parametrize("critic", ["null", "./mine", None])
def test_a_saved_chain_loads_as_the_same_chain(first: str | None, critic: str | None) -> None:
    overrides = [f"pacore.model.critic={critic}"] if critic else []
    chain = mine("rlvr.ppo.lam=0.5", *overrides, first=first)
    for name, text in saved_chain(chain).items():
        (chain.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (chain.folder / name).write_text(text)
    saved = chain.folder / "recipe.yaml"
    assert is_chain(saved)
    again = load_chain(saved, chain.folder, begun=True)
    assert [step.name for step in again.steps] == [step.name for step in chain.steps]
    for before, step in zip(chain.steps, again.steps, strict=True):
        assert step.resolved.plain() == before.resolved.plain()
    longer = load_chain(saved, chain.folder, begun=True, overrides=["pacore.iterations=9"])
    assert longer.steps[-1].resolved.config.iterations == 9


def test_a_critic_of_the_whole_chain_applies_to_the_first_stage_but_null_to_all() -> None:
    first, _, last = (step.resolved.config.model.critic for step in mine("model.critic=./own").steps)
    assert first == Path("own").absolute() and str(last).endswith("rlvr/checkpoints/000600/critic")
    assert mine("model.critic=null").steps[2].resolved.config.model.critic is None


def test_options_that_name_results_of_earlier_steps_cannot_be_set() -> None:
    assert "pacore.model.path cannot be set in a chain: the stage starts from the policy of rlvr" in refusal(
        "pacore.model.path=./x"
    )
    assert "pacore.data.train cannot be set in a chain" in refusal("pacore.data.train=x.jsonl")
    assert "a chain has no option stage, because each of its recipes has" in refusal(text=MINE + "stage: rlvr\n")


def test_curated_rows_have_our_column_names_even_if_the_rows_of_problems_do_not() -> None:
    config = mine("data.columns.ground_truth=answer").steps[2].resolved.config
    assert config.data.train[0].columns == {"ground_truth": "ground_truth"}


def test_a_curation_that_makes_too_few_messages_for_the_next_stage_is_refused() -> None:
    assert "needs 16 messages in each row" in refusal("curate.difficulty.rollouts=8")
    assert "needs 16 messages in each row" in refusal("curate.filters=[synthesis]")
    assert mine("curate.filters=[synthesis]", "pacore.synthesis.pool=online")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain: []", "chain must be a list of recipes"),
        ("chain: rlvr.yaml", "chain must be a list of recipes"),
        ("chain: [3]", "chain has the entry 3; an entry must be RECIPE or curate: RECIPE"),
        ("chain: [rlvr.yaml, rlvr.yaml]", "chain has rlvr twice"),
        ("chain: [rlvr.yaml, {curate: curate.yaml}]", "curate belongs between two stages"),
        ("chain: [{curate: curate.yaml}, pacore.yaml]", "curate belongs between two stages"),
        ("chain: [none.yaml]", "mine.yaml: chain: no recipe none.yaml: there is no such file"),
        ("chain: [mine.yaml]", "mine.yaml, which is a chain itself"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(text: str, message: str) -> None:
    assert message in refusal(text=text)


def test_a_stage_that_the_chain_does_not_have_is_refused() -> None:
    assert "rlhf.* is for the stage rlhf; the steps are rlvr, curate, pacore" in refusal("rlhf.iterations=3")
    assert "the chain cannot begin with the stage rlhf; its stages are rlvr, pacore" in refusal(first="rlhf")
    assert "chain belongs in a recipe file" in refusal("chain=[rlvr.yaml]")


def test_a_mistake_in_a_stages_recipe_is_reported_with_its_file() -> None:
    Path("pacore.yaml").write_text(STAGE.format(stage="pacore") + "ppo: {gama: 1}\n")
    assert "pacore.yaml: unknown option ppo.gama; did you mean ppo.gamma?" in refusal()
