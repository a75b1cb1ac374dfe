"""Tests how layers are merged, where values come from, how paths become absolute, and how mistakes are reported."""

from pathlib import Path

import pytest

from rl.recipe.chain import is_chain, load_chain
from rl.recipe.layers import SHIPPED, flatten
from rl.recipe.resolve import MissingOption, RecipeError, Resolved, describe, differences, load

MINE = """
stage: rlvr
model: {path: ./model}
data: {train: train.jsonl}
rewards:
  math: {use: math_verify}
"""
ROWS = "data.train=rows.jsonl"  # the full-size recipe does not set this option


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> Path:
    """Writes a file below the working directory and returns its relative path."""
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def mine(text: str = "", *overrides: str, profile: str | None = None) -> Resolved:
    return load(write("mine.yaml", MINE + text), overrides=overrides, profile=profile)


def refusal(text: str = "", *overrides: str, profile: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        mine(text, *overrides, profile=profile)
    return str(caught.value)


# Shipped recipes


GIVEN = [ROWS, "model.path=owner/name", "endpoints.judge.model=owner/judge"]
CHAINS = sorted(path for path in SHIPPED.glob("*.yaml") if is_chain(path))
ALONE = sorted(set(SHIPPED.glob("*.yaml")) - set(CHAINS))
PROFILES = [None, *sorted(path.stem for path in SHIPPED.glob("profiles/*.yaml"))]


@pytest.mark.parametrize("recipe", ALONE, ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_recipe_loads(recipe: Path, profile: str | None):
    resolved = load(recipe, profile=profile, overrides=[] if profile else GIVEN)
    assert resolved.config.stage == (recipe.stem if recipe.stem in ("rlhf", "pacore") else "rlvr")


@pytest.mark.parametrize("recipe", CHAINS, ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_chain_loads(recipe: Path, profile: str | None):
    chain = load_chain(recipe, Path.cwd() / "run", profile=profile, overrides=[] if profile else GIVEN)
    assert [step.name for step in chain.steps] == ["rlvr", "rlhf", "curate", "pacore"]
    if profile is None:
        configs = [step.resolved.config for step in chain.trained()]
        assert sum(config.iterations for config in configs) == 1400
        assert sum(config.iterations * config.samples for config in configs) == 6_656_000


def test_the_rlvr_recipe_repeats_the_defaults_without_a_change():
    full = load(SHIPPED / "rlvr.yaml", overrides=[ROWS]).config
    bare = load(None, stage="rlvr", overrides=["model.path=stepfun-ai/Step3-VL-10B", ROWS, "rewards.x.use=exact"])
    assert [change.key for change in differences(bare.config, full) if not change.key.startswith("rewards.")] == []


def test_the_cpu_profile_only_changes_options_of_scale():
    full = load(SHIPPED / "rlvr.yaml", overrides=[ROWS]).config
    small = load(SHIPPED / "rlvr.yaml", profile="cpu").config
    sizes = {"iterations", "prompts_per_iteration", "rollouts_per_prompt", "max_sequence_length"}
    scale = sizes | {"model.path", "model.dtype", "data.train", "data.eval", "ppo.policy_lr", "ppo.critic_lr"}
    changed = {change.key for change in differences(full, small)} - scale
    assert {key.split(".")[0] for key in changed} <= {
        "rollout",
        "learner",
        "checkpoint",
        "eval",
        "endpoints",
        "curate",
        "accept",
        "synthesis",
    }
    assert "rollout.temperature" not in changed


def test_the_message_for_missing_rows_names_their_columns_and_a_profile_with_rows():
    with pytest.raises(MissingOption) as caught:
        load(SHIPPED / "rlvr.yaml")
    message = str(caught.value)
    for part in ("rlvr.yaml: data.train is ???", "not public", "task, messages", "--profile cpu"):
        assert part in message


# Layers


def test_later_layers_win_and_each_value_has_the_name_of_its_layer():
    write("base.yaml", "seed: 1\niterations: 1\nrollouts_per_prompt: 1\nppo: {gamma: 0.1, lam: 0.1}")
    write("profiles/tiny.yaml", "rollouts_per_prompt: 3\nppo: {minibatches: 2}")
    text = "base: base.yaml\niterations: 2\nrollouts_per_prompt: 2\nppo: {lam: 0.2}"
    resolved = mine(text, "ppo.minibatches=1", profile="tiny")
    values = flatten(resolved.plain())
    assert {key: (values[key], resolved.provenance[key]) for key in (
        "seed", "iterations", "rollouts_per_prompt", "ppo.gamma", "ppo.lam", "ppo.minibatches",
        "prompts_per_iteration", "ppo.clip",
    )} == {
        "seed": (1, "base.yaml"),
        "iterations": (2, "mine.yaml"),
        "rollouts_per_prompt": (3, "profile tiny"),
        "ppo.gamma": (0.1, "base.yaml"),
        "ppo.lam": (0.2, "mine.yaml"),
        "ppo.minibatches": (1, "command line"),
        "prompts_per_iteration": (512, "default of stage rlvr"),
        "ppo.clip": (0.2, "default"),
    }  # fmt: skip


def test_a_base_may_have_a_base_and_shipped_recipes_are_bases_by_name():
    write("up/middle.yaml", "base: rlvr\nseed: 5")
    write("mine.yaml", "base: up/middle.yaml\ndata: {train: x.jsonl}")
    resolved = load(Path("mine.yaml"))
    assert (resolved.config.seed, resolved.config.iterations) == (5, 600)
    assert resolved.provenance["seed"] == "up/middle.yaml"


def test_bases_that_form_a_circle_are_refused():
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: a.yaml")
    with pytest.raises(RecipeError, match=r"circle: a.yaml -> b.yaml -> a.yaml"):
        load(Path("a.yaml"))


def test_a_new_reward_does_not_inherit_the_parameters_of_the_old_one():
    write("base.yaml", "rewards: {box: {use: iou, params: {power: 2}}, dot: {use: exact, timeout_s: 3}}")
    resolved = mine("  box: {use: exact}\n  dot: {memory_mb: 100}\nbase: base.yaml")
    rewards = resolved.config.rewards
    assert (rewards["box"][0].params, resolved.provenance["rewards.box.params"]) == ({}, "default")
    assert (rewards["dot"][0].use, rewards["dot"][0].timeout_s, rewards["dot"][0].memory_mb) == ("exact", 3, 100)


def test_a_list_with_one_reward_equals_that_reward():
    resolved = mine("  box: [{use: iou}]", "rewards.box.params.power=1")
    assert resolved.config.rewards["box"][0].use == "iou"
    assert resolved.plain()["rewards"]["box"]["params"] == {"power": 1}


def test_several_rewards_are_weighted_and_have_penalties():
    text = "  box: [{use: iou, weight: 0.8, penalties: [citation, {use: own.py:Rude, magnitude: 0.5}]}, {use: exact}]"
    first, second = mine(text).config.rewards["box"]
    assert (first.weight, second.weight) == (0.8, 1.0)
    assert [(penalty.use, penalty.magnitude) for penalty in first.penalties] == [
        ("citation", 1.0),
        (f"{Path.cwd()}/own.py:Rude", 0.5),
    ]
    assert "unknown option rewards.box.wait; did you mean rewards.box.weight?" in refusal(
        "  box: [{use: a}, {wait: 1}]"
    )


def test_a_list_of_rewards_replaces_the_reward_of_the_base_recipe():
    write("base.yaml", "rewards: {box: {use: iou, params: {power: 2}}}")
    resolved = mine("  box: [{use: exact, weight: 0.5}, {use: iou, weight: 0.5}]\nbase: base.yaml")
    assert [(one.use, one.params) for one in resolved.config.rewards["box"]] == [("exact", {}), ("iou", {})]
    assert resolved.provenance["rewards.box"] == "mine.yaml"


def test_values_may_refer_to_each_other_and_to_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEPS", "7")
    config = mine("iterations: ${oc.env:STEPS}0\nseed: ${rollouts_per_prompt}", "iterations=3").config
    assert (config.seed, config.iterations) == (16, 3)
    assert refusal("seed: ${nope}").startswith("mine.yaml: seed cannot be resolved: Interpolation key 'nope'")


def test_three_question_marks_remove_the_value_of_earlier_layers():
    with pytest.raises(MissingOption, match="iterations is \\?\\?\\?, which only you can fill in"):
        mine("iterations: 3", "iterations=???")
    assert mine("iterations: ???", "iterations=3").config.iterations == 3
    with pytest.raises(MissingOption, match=r"pacore.yaml: model.path is \?\?\?.* the policy that RLVR and RLHF"):
        load(SHIPPED / "pacore.yaml", overrides=[ROWS])


def test_a_section_named_after_a_stage_is_for_that_stage_only():
    assert load(SHIPPED / "rlvr.yaml", profile="cpu").config.max_sequence_length == 136
    small = load(SHIPPED / "pacore.yaml", profile="cpu", overrides=["pacore.iterations=7", "iterations=9"])
    assert (small.config.max_sequence_length, small.config.iterations) == (1024, 7)
    assert small.provenance["max_sequence_length"] == "profile cpu, pacore"
    with pytest.raises(RecipeError, match=r"pacore\.\* is for the stage pacore, but the run's stage is rlvr"):
        load(SHIPPED / "rlvr.yaml", profile="cpu", overrides=["pacore.iterations=7"])
    assert "the section pacore must have options of that stage" in refusal("pacore: 5")
    assert "pacore.stage cannot be" in refusal("pacore: {stage: rlvr}")


def test_the_command_line_can_have_all_values_without_a_recipe():
    resolved = load(None, stage="rlvr", overrides=["model.path=gpt2", "rewards.m.use=exact", ROWS])
    assert resolved.config.iterations == 600
    assert resolved.provenance["model.path"] == "command line"


# Paths


def test_paths_are_relative_to_the_file_that_names_them():
    write("rows/held.jsonl", "")
    write("profiles/other.yaml", "data: {eval: ../rows/held.jsonl}\nmodel: {chat_template: chat.jinja}")
    write("mine/r.yaml", MINE.replace("math_verify", "own.py:Right"))
    here = Path.cwd()
    config = load(Path("mine/r.yaml"), profile="profiles/other.yaml", overrides=["data.train=[t.jsonl]"]).config
    assert config.model.path == str(here / "mine/model")
    assert config.model.chat_template == here / "profiles/chat.jinja"
    assert [source.path for source in config.data.eval] == [str(here / "rows/held.jsonl")]
    assert [source.path for source in config.data.train] == [str(here / "t.jsonl")]
    assert config.rewards["math"][0].use == f"{here}/mine/own.py:Right"


def test_a_parameter_that_is_a_path_is_relative_to_the_layer_that_sets_it():
    write("mine/judge.jinja", "")
    recipe = write("mine/r.yaml", MINE + "  box: {use: verifier, params: {template: judge.jinja, rule: all}}\n")
    config, other = load(recipe).config, load(recipe, overrides=["rewards.box.params.template=./mine.jinja"]).config
    assert config.rewards["box"][0].params == {"template": f"{Path.cwd()}/mine/judge.jinja", "rule": "all"}
    assert other.rewards["box"][0].params["template"] == f"{Path.cwd()}/mine.jinja"


def test_hub_ids_stay_as_they_are_unless_a_folder_has_that_name():
    hub = mine("", "model.path=owner/name", "data.train=owner/rows:train").config
    assert (hub.model.path, hub.data.train[0].path) == ("owner/name", "owner/rows:train")
    Path("owner/name").mkdir(parents=True)
    assert mine("", "model.path=owner/name").config.model.path == str(Path.cwd() / "owner/name")


def test_a_saved_recipe_loads_as_the_same_config_from_anywhere(monkeypatch: pytest.MonkeyPatch):
    before = load(SHIPPED / "rlvr.yaml", profile="cpu", overrides=[
        "rollout.save=7", "rewards.math.params={template: '\\${x}', tag: '1e3'}",
        "ppo.rollout_correction.verl.rollout_is=token",
    ])  # fmt: skip
    saved = write("run/recipe.yaml", before.yaml())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = load(Path("..") / saved)
    assert again.config == before.config
    assert again.yaml() == before.yaml()
    assert before.config.rewards["math"][0].params == {"template": "${x}", "tag": "1e3"}


# Messages and listings


def test_describe_shows_each_value_with_its_source():
    lines = [line.split() for line in describe(mine("", "seed=4")).splitlines()]
    assert ["seed", "4", "command", "line"] in lines
    assert ["iterations", "600", "default", "of", "stage", "rlvr"] in lines
    assert ["model.path", str(Path.cwd() / "model"), "mine.yaml"] in lines


def test_differences_name_each_changed_key_with_both_values():
    changes = differences(mine().config, mine("", "ppo.lam=0.5", "rewards.new.use=exact").config)
    assert "ppo.lam: 1.0 -> 0.5" in map(str, changes)
    assert ("rewards.new.use", None, "exact") in changes
    assert differences(mine().config, mine().config) == []


@pytest.mark.parametrize("written, advice", [
    ("ppo: {gama: 1}", "mine.yaml: unknown option ppo.gama; did you mean ppo.gamma?"),
    ("gamma: 1", "mine.yaml: unknown option gamma; did you mean ppo.gamma?"),
    ("modle: {path: x}", "mine.yaml: unknown option modle; did you mean model?"),
    ("ppo.gamma: 1", "mine.yaml: unknown option ppo.gamma; in a file it is written nested"),
    ("  box: {uze: iou}", "mine.yaml: unknown option rewards.box.uze; did you mean rewards.box.use?"),
    ("eval: {xyz: 1}", "mine.yaml: unknown option eval.xyz; eval has the options every, batch"),
])  # fmt: skip
def test_an_unknown_name_is_reported_with_its_file_and_the_nearest_name(written: str, advice: str):
    assert advice in refusal(written)


def test_an_unknown_name_is_reported_before_a_missing_value():
    with pytest.raises(RecipeError, match=r"command line: unknown option ppo.gama; did you mean ppo.gamma\?"):
        load(SHIPPED / "rlvr.yaml", overrides=["ppo.gama=1"])


@pytest.mark.parametrize("written, message", [
    ("iterations: many", 'mine.yaml: iterations = "many" should be a valid integer (Number of iterations'),
    ("ppo: {gamma: 2}", "mine.yaml: ppo.gamma = 2 should be less than or equal to 1 (Discount"),
    ("rollout: {save: some}", "should be a valid integer or 'all' or 'none'"),
    ("ppo: 3", "mine.yaml: ppo = 3 should be a mapping of options"),
    ("ppo: [3]", "mine.yaml: ppo is a list; it should be a mapping of options"),
    ("  box: {params: {power: 2}}", "mine.yaml: rewards.box.use is missing"),
    ("ppo: {kl: 0.1}", "mine.yaml: ppo.kl = 0.1 is not implemented yet; it can only be 0"),
    ("chain: [rlvr.yaml]", "mine.yaml: the recipe is a chain, which only rl.run can run"),
])  # fmt: skip
def test_a_value_that_does_not_fit_is_reported_with_its_file_and_what_is_allowed(written: str, message: str):
    assert message in refusal(written)


def test_the_message_for_a_wrong_value_names_the_layer_that_set_it():
    assert refusal("seed: 1", "seed=-1").startswith("command line: seed = -1 ")
    write("profiles/odd.yaml", "seed: -1")
    assert refusal("seed: 1", profile="odd").startswith("profiles/odd.yaml: seed = -1 ")


def test_the_message_for_a_mandatory_value_has_the_comment_beside_it():
    text = "seed: ???  # any number\n           # but zero\niterations: 1 # unrelated"
    assert "mine.yaml: seed is ???, which only you can fill in: any number but zero\n" in refusal(text)


def test_the_message_for_a_missing_value_has_its_name():
    with pytest.raises(MissingOption, match=r"r.yaml: data.train is missing \(Training rows"):
        load(write("r.yaml", "stage: rlvr\nmodel: {path: m}\nrewards: {m: {use: exact}}"))
    with pytest.raises(MissingOption, match=r"r.yaml: stage is missing; it is one of rlvr, rlhf, pacore"):
        load(write("r.yaml", "seed: 1"))


def test_a_stage_other_than_the_recipes_is_refused():
    file = write("mine.yaml", MINE)
    assert load(file, stage="rlvr").config.stage == "rlvr"
    with pytest.raises(RecipeError, match=r"mine.yaml: the recipe's stage is rlvr, so --stage rlhf cannot be used"):
        load(file, stage="rlhf")
    with pytest.raises(RecipeError, match="command line: there is no stage rl; the stages are rlvr"):
        load(file, overrides=["stage=rl"])


@pytest.mark.parametrize("text, message", [
    ("seed: 1\nppo: [1\niterations: 2\n", "r.yaml, line 3: not valid YAML"),
    ("seed: 1\nseed: 2\n", "r.yaml, line 2: not valid YAML: found duplicate key seed"),
    ("- seed\n", "r.yaml: the file contains a list"),
    ("base: nowhere.yaml\n", "r.yaml: base: no recipe nowhere.yaml: there is no such file"),
    ("base: ???\n", "r.yaml: base: no recipe ???"),
])  # fmt: skip
def test_a_file_that_is_no_recipe_is_reported_with_the_line(text: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load(write("r.yaml", text))
    assert message in str(caught.value)


def test_the_message_for_a_file_that_does_not_exist_names_it():
    with pytest.raises(RecipeError, match=r"^none.yaml: no such file$"):
        load(Path("none.yaml"))
    assert refusal(profile="gpu-9") == "no profile gpu-9; choose from cpu, or give the path of a YAML file"
    assert refusal(profile="./none.yaml") == "none.yaml: no such file"


@pytest.mark.parametrize("override", ["seed", "=1", "seed =1", "seed=[1", "base=rlvr"])
def test_an_override_that_is_not_key_equals_value_is_refused(override: str):
    assert refusal("", override).startswith("command line: ")


@pytest.mark.parametrize("given", ["url=http://judge:8000/v1", "model=owner/judge"])
def test_a_new_model_or_url_of_a_judge_clears_its_serve_options(given: str):
    small = load(SHIPPED / "rlhf.yaml", profile="cpu").config.endpoints["judge"]
    assert small.serve["dtype"] == "float32"
    other = load(SHIPPED / "rlhf.yaml", profile="cpu", overrides=[f"endpoints.judge.{given}"]).config.endpoints["judge"]
    assert other.serve == {} and other.images and other.concurrency == small.concurrency


def test_serve_options_beside_a_new_model_are_used():
    own = ["endpoints.judge.model=owner/judge", "endpoints.judge.serve.dtype=float16"]
    config = load(SHIPPED / "rlhf.yaml", profile="cpu", overrides=own).config
    assert config.endpoints["judge"].serve == {"dtype": "float16"}


def test_the_rlhf_recipe_has_the_reports_sizes_and_penalties():
    config = load(SHIPPED / "rlhf.yaml", overrides=GIVEN).config
    assert (config.iterations, config.prompts_per_iteration, config.rollouts_per_prompt) == (300, 512, 8)
    assert config.max_sequence_length == 32_768 and config.ppo.minibatches == 4
    assert [one.use for one in config.rewards["chat"][0].penalties] == [
        "language_consistency",
        "citation",
        "calibration",
    ]
