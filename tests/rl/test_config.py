"""Tests that options are frozen and strictly typed, that each option has a description, and that contradictory options
are refused."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rl.config import Config, Source
from rl.recipe.errors import declared
from tests.support.configs import config


def test_importing_the_options_does_not_import_torch():
    code = "import sys, rl.recipe.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_option_has_a_sentence():
    without = [key for key, option in declared({"rewards": {}, "endpoints": {}}).items() if not option.meaning]
    assert without == []


def test_values_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config().ppo, "gamma", 0.5)  # noqa: B010 (the type checker refuses a plain assignment)


def test_the_defaults_are_the_values_of_the_report():
    ppo = config().ppo
    assert (ppo.gamma, ppo.lam, ppo.policy_lr, ppo.critic_lr) == (1, 1, 2e-6, 5e-6)
    assert (ppo.ratio, ppo.tis_cap, ppo.tis_policy, ppo.kl, ppo.entropy) == ("none", 8, "current", 0, 0)


def test_a_single_source_is_read_as_a_list():
    assert config(data__train="a.jsonl").data.train == (Source(path="a.jsonl"),)
    assert config(data__train=["a", {"path": "b", "limit": 2}]).data.train == (
        Source(path="a"),
        Source(path="b", limit=2),
    )
    assert config(log__trackers="wandb").log.trackers == ("wandb",)


def test_a_config_dumped_as_json_reads_as_the_same_config():
    before = config(rollout__save=3, ppo__rollout_correction={"verl": {"rollout_is": "token"}})
    assert Config.model_validate_json(before.model_dump_json()) == before


@pytest.mark.parametrize("key, value", [
    ("iterations", "60"), ("iterations", 1.5), ("iterations", 0), ("iterations", True),
    ("ppo__gamma", 1.01), ("ppo__gamma", "high"), ("ppo__policy_lr", -1e-6), ("ppo__policy_lr", float("inf")),
    ("ppo__betas", [0.9, 1.0]), ("ppo__betas", [0.9]), ("ppo__ratio", "ppo"),
    ("rollout__temperature", 0), ("rollout__save", "some"), ("rollout__save", 0),
    ("data__train", 3), ("data__train", []),
    ("model__dtype", "float16"), ("rewards", {}), ("log__trackers", ["paper"]),
    ("ppo__rollout_correction", {"verl": {"rollout_rs": "token_k9", "rollout_rs_threshold": 2}}),
])  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(key: str, value: Any):
    with pytest.raises(ValidationError):
        config(**{key: value})


@pytest.mark.parametrize("key, value", [
    ("model__freeze", ["encoder"]), ("model__freeze", []),
    ("ppo__kl", 0.1),
])  # fmt: skip
def test_an_option_that_nothing_implements_yet_is_refused(key: str, value: Any):
    with pytest.raises(ValidationError, match=f"{key.replace('__', '.')} = .* is not implemented yet"):
        config(**{key: value})


def test_verifiable_tasks_have_a_reward():
    named = {"preference__verifiable_tasks": ["math"]}
    assert config(stage="rlhf", **named).preference.verifiable_tasks == ("math",)
    with pytest.raises(ValidationError, match="has 'maths', for which there is no reward"):
        config(stage="rlhf", preference__verifiable_tasks=["maths"])


def test_frozen_parts_may_be_named_in_any_order():
    assert config(model__freeze=["projector", "encoder"]) == config()


def test_more_minibatches_than_samples_are_refused():
    assert config(ppo__minibatches=4).samples == 4
    with pytest.raises(ValidationError, match=r"ppo.critic_minibatches = 5 is more than the 4 samples"):
        config(ppo__critic_minibatches=5)


def test_a_forward_pass_must_hold_one_sequence():
    assert config(learner__token_budget=64)
    with pytest.raises(ValidationError, match=r"learner.token_budget = 63 cannot hold one sequence"):
        config(learner__token_budget=63)


def test_a_loss_of_verl_needs_the_ratio_it_clips():
    assert config(ppo__policy_loss={"verl": "gspo"}, ppo__ratio="clip")
    with pytest.raises(ValidationError, match=r"set ppo.ratio: clip"):
        config(ppo__policy_loss={"verl": "gspo"})


def test_a_rollout_correction_without_effect_is_refused():
    with pytest.raises(ValidationError, match="has no weights and no rejection"):
        config(ppo__rollout_correction={"verl": {}})
    with pytest.raises(ValidationError, match="has only one of rollout_rs and rollout_rs_threshold"):
        config(ppo__rollout_correction={"verl": {"rollout_rs": "seq_mean_k1"}})


def test_a_parameter_may_name_the_variable_of_a_secret_but_not_hold_it():
    assert config(rewards__math__params={"api_key_env": "KEY", "max_tokens": 3})
    for params in ({"api_key": "s3cret"}, {"judge": {"password": "s3cret"}}):
        with pytest.raises(ValidationError, match="put it into an environment variable"):
            config(rewards__math__params=params)


def test_sections_refuse_unknown_names():
    models = [kind for kind in BaseModel.__subclasses__() if kind.__module__ == "rl.config"]
    assert models
    assert all(kind.model_config.get("extra") == "forbid" for kind in models)
