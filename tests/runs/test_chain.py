"""Stages that follow each other: recipes of a chain, what links its steps, and a whole small one."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from rl.recipe.chain import Chain, is_chain, load_chain, saved_chain
from rl.recipe.resolve import RecipeError
from rl.run import main
from stages.pipeline import FinalTable, before_and_after
from tests.support.command import ROOT, Command, metrics, run, wait_for, wait_for_iteration, without_times

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


def test_every_stage_starts_from_the_policy_and_critic_of_the_one_before() -> None:
    chain = mine()
    rlvr, curate, pacore = (step.resolved.config for step in chain.steps)
    assert [step.name for step in chain.steps] == ["rlvr", "curate", "pacore"]
    assert rlvr.model.path == str(Path("start").absolute()) and rlvr.model.critic is None
    assert curate.model.path == pacore.model.path == str(chain.folder / "rlvr/policy")
    assert pacore.model.critic == chain.folder / "rlvr/checkpoints/000600/critic"
    assert pacore.data.train[0].path == str(chain.folder / "curate/rows") and pacore.data.on_bad_row == "skip"
    assert curate.data.train[0].path == str(Path("rows.jsonl").absolute())


def test_the_chains_recipe_speaks_to_all_stages_or_to_one() -> None:
    chain = mine("rlvr.ppo.policy_lr=1e-3", "rollouts_per_prompt=2")
    rlvr, _, pacore = (step.resolved.config for step in chain.steps)
    assert (rlvr.seed, pacore.seed, pacore.iterations, rlvr.iterations) == (5, 5, 7, 600)
    assert (rlvr.ppo.policy_lr, pacore.ppo.policy_lr) == (1e-3, 2e-6)
    assert rlvr.rollouts_per_prompt == pacore.rollouts_per_prompt == 2
    assert chain.steps[2].resolved.provenance["iterations"] == "mine.yaml, pacore"


def test_a_stage_may_begin_with_a_critic_of_its_own() -> None:
    assert mine("pacore.model.critic=null").steps[2].resolved.config.model.critic is None


def test_a_chain_can_begin_with_a_later_stage_and_makes_its_rows_first() -> None:
    chain = mine("model.path=./other", first="pacore")
    assert [step.name for step in chain.steps] == ["curate", "pacore"]
    curate, pacore = (step.resolved.config for step in chain.steps)
    assert curate.model.path == pacore.model.path == str(Path("other").absolute())
    assert pacore.model.critic is None and pacore.data.train[0].path == str(chain.folder / "curate/rows")


@pytest.mark.parametrize("first", [None, "pacore"])
@pytest.mark.parametrize("critic", ["null", "./mine", None])
def test_a_saved_chain_loads_again_as_the_same_one(first: str | None, critic: str | None) -> None:
    said = [f"pacore.model.critic={critic}"] if critic else []
    chain = mine("rlvr.ppo.lam=0.5", *said, first=first)
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


def test_a_critic_for_the_whole_chain_is_the_first_stages_and_none_is_everyones() -> None:
    first, _, last = (step.resolved.config.model.critic for step in mine("model.critic=./own").steps)
    assert first == Path("own").absolute() and str(last).endswith("rlvr/checkpoints/000600/critic")
    assert mine("model.critic=null").steps[2].resolved.config.model.critic is None


def test_what_an_earlier_step_leaves_cannot_be_said_otherwise() -> None:
    assert "pacore.model.path cannot be said in a chain: it starts from the policy of rlvr" in refusal(
        "pacore.model.path=./x"
    )
    assert "pacore.data.train cannot be said in a chain" in refusal("pacore.data.train=x.jsonl")
    assert "stage stands in the recipes of a chain" in refusal(text=MINE + "stage: rlvr\n")


def test_curated_rows_have_our_names_whatever_the_problems_had() -> None:
    config = mine("data.columns.ground_truth=answer").steps[2].resolved.config
    assert config.data.train[0].columns == {"ground_truth": "ground_truth"}


def test_a_curation_that_makes_too_few_messages_is_refused() -> None:
    assert "needs 16 messages in each row" in refusal("curate.difficulty.rollouts=8")
    assert "needs 16 messages in each row" in refusal("curate.filters=[synthesis]")
    assert mine("curate.filters=[synthesis]", "pacore.synthesis.pool=online")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("chain: []", "chain is a list of recipes"),
        ("chain: rlvr.yaml", "chain is a list of recipes"),
        ("chain: [3]", "chain holds 3; give a recipe's name or path"),
        ("chain: [rlvr.yaml, rlvr.yaml]", "chain has rlvr twice"),
        ("chain: [rlvr.yaml, {curate: curate.yaml}]", "curate belongs between two stages"),
        ("chain: [{curate: curate.yaml}, pacore.yaml]", "curate belongs between two stages"),
        ("chain: [none.yaml]", "mine.yaml: chain: no recipe none.yaml: there is no such file"),
        ("chain: [mine.yaml]", "mine.yaml, which is a chain itself"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(text: str, told: str) -> None:
    assert told in refusal(text=text)


def test_what_names_a_stage_that_the_chain_has_not_is_refused() -> None:
    assert "rlhf.* is for the stage rlhf; the chain has rlvr, curate, pacore" in refusal("rlhf.iterations=3")
    assert "no stage rlhf to begin with; it has rlvr, pacore" in refusal(first="rlhf")
    assert "chain belongs in a recipe file" in refusal("chain=[rlvr.yaml]")


def test_a_mistake_in_any_stage_is_told_with_its_file() -> None:
    Path("pacore.yaml").write_text(STAGE.format(stage="pacore") + "ppo: {gama: 1}\n")
    assert "pacore.yaml: unknown option ppo.gama; did you mean ppo.gamma?" in refusal()


# The whole recipe with stages of two iterations.
SMALL = (
    *("rl.run", ROOT / "recipes/step3_vl.yaml", "--profile", "cpu", "rollouts_per_prompt=4"),
    *(
        f"{stage}.{size}"
        for stage in ("rlvr", "rlhf", "pacore")
        for size in ("iterations=2", "prompts_per_iteration=4")
    ),
    *("data.eval_limit=2", "eval.sampled_rows=1"),
    *("curate.rows=40", "curate.filters=[difficulty]", "curate.difficulty.rollouts=20"),
)


def test_a_dry_run_of_the_whole_recipe_tells_of_every_step_and_starts_nothing(tmp_path: Path) -> None:
    code, out, err = run(
        "rl.run", ROOT / "recipes/step3_vl.yaml", "--profile", "cpu", "--dry-run", "--output", tmp_path / "run"
    )
    assert code == 0, err
    for part in ("--- rlvr", "--- rlhf", "--- curate", "--- pacore", f"model      {tmp_path}/run/rlhf/policy, critic"):
        assert part in out
    assert not (tmp_path / "run").exists()


def test_what_a_stage_evaluates_before_it_trains_completes_how_the_one_before_left_the_policy() -> None:
    held_out, wins = before_and_after(
        {
            "rlvr": [{"iteration": 0, "eval/sums": 0.2}, {"iteration": 1}, {"iteration": 2, "eval/sums": 0.6}],
            "rlhf": [
                {"iteration": 0, "eval/sums": 0.5, "eval/chats": 0.3, "eval/win_rate": 0.25},
                {"iteration": 1, "eval/sums": 0.6, "eval/chats": 0.7, "eval/win_rate": 0.75},
            ],
            "pacore": [{"iteration": 0, "eval/sums": 0.5, "eval/places": 0.4}, {"iteration": 1, "eval/sums": 0.9}],
        }
    )
    assert held_out == {
        "start": {"sums": 0.2},
        "rlvr": {"sums": 0.6, "chats": 0.3},
        "rlhf": {"sums": 0.6, "chats": 0.7},
        "pacore": {"sums": 0.9},
    }
    assert wins == {"rlvr": 0.25, "rlhf": 0.75}


def test_the_last_table_shows_how_often_the_last_policy_wins(capsys: pytest.CaptureFixture) -> None:
    FinalTable({"rlhf": {"chats": 0.7}}, (), {"rlhf": 0.75}, 0.625).show(Console(width=100))
    out = capsys.readouterr().out
    assert "SeRe pass@1" in out and "0.750" in out and "0.625" in out


def test_a_dry_run_can_begin_with_a_later_stage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    policy = ROOT / "recipes/scale/model"
    given = ["--profile", "cpu", "--stage", "pacore", f"model.path={policy}", "pacore.iterations=100", "--dry-run"]
    assert main([str(ROOT / "recipes/step3_vl.yaml"), *given, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "--- curate" in out and "stage      pacore, 100 iterations" in out and "--- rlhf" not in out


def test_what_is_wrong_with_a_later_stage_is_told_before_the_first_begins(tmp_path: Path) -> None:
    longer = ("pacore.max_sequence_length=99999", "pacore.learner.token_budget=99999")
    code, _, err = run(*SMALL, *longer, "--output", tmp_path / "run")
    assert code == 2 and "is more than the 4096 positions" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_chain_that_is_broken_off_in_every_step_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, out, err = run(*SMALL, "--output", whole, timeout=900)
    assert code == 0, err
    assert "PaCoRe@16" in out and "wins against the teacher" in out and f"policy: {whole / 'policy'}" in out
    steps = {"rlvr", "rlhf", "curate", "pacore"}
    assert {path.name for path in whole.iterdir()} >= {"recipe.yaml", *steps, "policy", "final"}
    told = [(line["stage"], line["iteration"]) for line in metrics(whole)]
    assert told == [(stage, number) for stage in ("rlvr", "rlhf", "pacore") for number in range(3)]
    table = json.loads((whole / "final/table.json").read_text())
    assert list(table["held_out"]) == ["start", "rlvr", "rlhf", "pacore"] and table["sampled"]
    assert list(table["win_rate"]) == ["rlvr", "rlhf"] and 0 <= table["sampled_win_rate"] <= 1
    assert "describing" in table["held_out"]["rlvr"] and "describing" in table["held_out"]["rlhf"]

    command = Command(*SMALL, "--output", halves)
    wait_for_iteration(halves / "rlhf", 1, command)
    command.interrupt()
    code, out, err = command.finish(timeout=600)
    assert code == 130 and f"--resume {halves}" in out
    command = Command("rl.run", "--resume", halves)
    wait_for((halves / "curate/recipe.yaml").exists, command)
    command.interrupt()
    assert command.finish(timeout=600)[0] == 130
    command = Command("rl.run", "--resume", halves)
    wait_for_iteration(halves / "pacore", 1, command)
    command.kill()
    assert command.left_behind(90) == []
    assert "keeps its recipe" in run("rl.run", "--resume", halves, "rlvr.iterations=3")[2]
    code, out, err = run("rl.run", "--resume", halves, timeout=600)
    assert code == 0, err
    assert "rlvr is done already" in out and "rlhf is done already" in out
    assert without_times(metrics(halves)) == without_times(metrics(whole))
    assert (halves / "policy/model.safetensors").read_bytes() == (whole / "policy/model.safetensors").read_bytes()
