"""Tests that a recipe cannot store a secret, and that ordinary values are not taken for secrets."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rl.recipe.errors import RecipeError
from rl.recipe.resolve import load, yaml_of
from rl.recipe.stored_secrets import secret_options, secret_variables
from tests.support.command import ROOT

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.SflKxwRJSMeKKF2QT4fwpM"


@pytest.mark.parametrize(
    "values",
    [
        {"judge_token": "open-sesame"},
        {"judge_key": "a1b2c3d4e5f6a7b8"},
        {"pass": "correct-horse-7-battery"},
        {"note": "gsk_0123456789abcdefghijABCD"},
        {"api_key": "x"},
        {"apiKey": "x"},
        {"serve": {"api-key": "x"}},
        {"openai_api_key": "x"},
        {"token": "open-sesame"},
        {"hf-token": "open-sesame"},
        {"db": [{"password": 1234}]},
        {"AWS_SECRET_ACCESS_KEY": "x"},
        {"headers": {"Authorization": "x"}},
        {"note": "sk-proj-0123456789abcdefghij"},
        {"note": "hf_ABCDEFGHIJKLMNOPQRSTUVWXYZ"},
        {"note": ["ghp_0123456789abcdefghijABCDEFGHIJ"]},
        {"note": f"Bearer {JWT}"},
        {"note": JWT},
        {"note": "-----BEGIN RSA PRIVATE KEY-----\nMII"},
        {"url": "http://user:pw@host/v1"},
        {"url": "https://0123456789abcdef@host/v1"},
        {"path": "see git+ssh://me:pw@host"},
        {"url": "http://host/v1?api_key=x"},
        {"url": "http://host/v1?a=1&token=x"},
    ],
)
def test_a_value_that_seems_to_be_a_secret_is_found(values: dict[str, Any]) -> None:
    assert len(list(secret_options(values))) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"api_key_env": "JUDGE_KEY", "hf_token_env": "HF_TOKEN"},
        {"max_tokens": 5, "token_budget": 10, "logprob_check_tokens": 3, "pad_token": "<pad>", "keys": ["a"]},
        {"api_key": "", "token": None, "password": False},
        {"url": "http://host:8000/v1", "other": "http://host/v1?a=1&keyword=b", "mail": "me@host", "at": "a @ b"},
        {"path": "/data/secret/train.jsonl", "model": "org/skeleton-sk-small", "key": "id", "sort_key": "name"},
        {"token": "<answer>", "eos_token": "<|im_end|>", "mask_token": "[MASK]", "judge_key": "question"},
        {"path": "/data/disk-skeleton/sk-abcdefghijklmnopqrst/rows.jsonl", "by": "sk-learn-and-more-things"},
        {"secretary": "x", "tokenizer": "x", "passwordless": "x"},
    ],
)
def test_an_ordinary_value_is_no_secret(values: dict[str, Any]) -> None:
    assert list(secret_options(values)) == []


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("endpoints.judge={url: 'http://u:p@h/v1', model: m}", "endpoints.judge.url is a URL that contains a user"),
        ("endpoints.judge={model: m, serve: {api-key: abc}}", "endpoints.judge.serve.api-key seems to be a secret"),
        ("curate.checkability.params={api_key: abc}", "curate.checkability.params.api_key seems to be a secret"),
        ("rewards.arithmetic.params={auth: '${oc.env:JUDGE_TOKEN}'}", "takes its value from JUDGE_TOKEN"),
        ("model.path=\"${oc.env:'MY_API_KEY'}/model\"", "model.path takes its value from MY_API_KEY"),
        ("model.path='${oc.env:MY_API_KEY}/model'", "model.path takes its value from MY_API_KEY"),
    ],
)
def test_a_recipe_with_a_secret_in_any_section_is_refused(
    option: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("JUDGE_TOKEN", "MY_API_KEY"):
        monkeypatch.setenv(variable, "not-to-be-stored")
    with pytest.raises(RecipeError) as caught:
        load(ROOT / "recipes/rlvr.yaml", profile="cpu", overrides=[option])
    assert why in str(caught.value) and "would be stored in recipe.yaml" in str(caught.value)
    assert "not-to-be-stored" not in str(caught.value)


def test_ordinary_environment_variables_may_be_used() -> None:
    assert list(secret_variables({"path": "${oc.env:DATA}/x", "seed": "${oc.env:SEED,0}"})) == []


@given(st.text(alphabet="\\${}:.,ab oc.env", max_size=30) | st.text(max_size=20))
def test_a_stored_text_comes_back_unchanged_and_is_never_replaced(text: str) -> None:
    stored = OmegaConf.create(yaml_of({"a": {"b": [text]}}))
    assert OmegaConf.to_container(stored, resolve=True) == {"a": {"b": [text]}}


def test_a_text_that_refers_to_the_environment_is_stored_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVATE", "value-of-private")
    text = r"\${oc.env:PRIVATE} \\${oc.env:PRIVATE}"
    (tmp_path / "stored.yaml").write_text(yaml_of({"text": text}))
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "stored.yaml"), resolve=True) == {"text": text}
