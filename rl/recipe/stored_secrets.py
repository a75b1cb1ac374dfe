"""Finds values of a recipe that seem to be secrets. A run stores its recipe in recipe.yaml and sends it to trackers, so
a recipe must not contain secrets."""

import re
from collections.abc import Iterator
from typing import Any

SECRET_NAME = re.compile(
    r"(^|_)(api_?keys?|(access|private|secret|signing|client|auth|session)_?keys?|secrets?|passwords?|passwd|"
    r"passphrase|pwd|credentials?|authorization|bearer)$"
)
"""Names of values that are secrets. The names are in lower case, with _ in place of - and of changes of case."""
TOKEN_NAME = re.compile(r"(^|_)token$")
"""Names such as judge_token. The value is a secret, unless it is a token of a tokenizer (see TOKENIZER_TOKEN)."""
TOKENIZER_TOKEN = re.compile(r"<.*>|\[.*\]|.{0,3}|\d+", re.DOTALL)
KEY_NAME = re.compile(r"(^|_)(key|pass)$")
"""Names such as judge_key, which may also be the name of a column. The value is a secret if it looks random."""
RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w.~+=-]{12,}")
SECRET_VALUE = re.compile(
    r"(?<![\w/.-])sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}|\bgsk_[A-Za-z0-9]{20,}|"
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|"
    r"\bglpat-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\bnvapi-[\w-]{20,}|"
    r"\bBearer\s+[\w.~+/-]{16,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""The forms of keys of OpenAI, Hugging Face, GitHub, GitLab, AWS, Slack, Google and NVIDIA, bearer tokens, JSON web
tokens, and private keys."""
USER_IN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#]*@")
KEY_IN_URL = re.compile(r"://\S*[?&]([\w-]+)=[^\s&]")
FROM_ENVIRONMENT = re.compile(r"oc\.env:[\s'\"]*([A-Za-z_]\w*)")


def secret_options(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, problem) for each value that seems to be a secret. `values` is a recipe, or a part of it.

    A value is a text or a number. It counts as a secret if its name is the name of a secret, if it has the form of a
    well-known kind of key, or if it is a URL with a user name or a key.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            yield from secret_options(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from secret_options(value, key)
    elif problem := _problem(key.rpartition(".")[2], values):
        yield key, problem


def secret_variables(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, variable) for each value that is taken from an environment variable with the name of a
    secret. `values` are the values of a recipe before `${oc.env:NAME}` is replaced."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from secret_variables(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from secret_variables(value, key)
    elif isinstance(values, str):
        for variable in FROM_ENVIRONMENT.findall(values):
            if _is_secret_name(variable) or variable.lower().endswith(("_key", "_token", "password")):
                yield key, variable


def _is_secret(name: str, value: str) -> bool:
    """True if a value with this name is a secret."""
    words = _words(name)
    if TOKEN_NAME.search(words):
        return TOKENIZER_TOKEN.fullmatch(value) is None
    if KEY_NAME.search(words) and RANDOM.fullmatch(value):
        return True
    return SECRET_NAME.search(words) is not None


def _is_secret_name(name: str) -> bool:
    words = _words(name)
    return SECRET_NAME.search(words) is not None or TOKEN_NAME.search(words) is not None


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()


def _problem(name: str, given: Any) -> str | None:
    if given is None or isinstance(given, bool) or name.endswith("_env"):  # *_env: the name of an environment variable
        return None
    value = str(given)
    if value and _is_secret(name, value):
        return "seems to be a secret"
    if SECRET_VALUE.search(value):
        return "contains a key or a token"
    if USER_IN_URL.search(value):
        return "is a URL that contains a user name or a password"
    if any(_is_secret_name(parameter) or parameter in ("key", "sig") for parameter in KEY_IN_URL.findall(value)):
        return "is a URL that contains a key"
    return None
