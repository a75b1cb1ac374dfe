"""Tests the registry: rewards are found by name, file, module and entry point, and parameters are checked."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewards import Score, get, names
from tests.support.reward_samples import rollout


def test_every_file_of_the_package_is_found_by_name() -> None:
    assert {"exact", "iou", "math_verify", "point_distance"} <= set(names())


def test_an_unknown_name_is_an_error_with_the_nearest_and_all_names() -> None:
    with pytest.raises(ValueError, match=r"'exakt' \(did you mean 'exact'\?\); there are: (\w+, )*exact, (\w+, )*iou"):
        get("exakt")


def test_an_unknown_parameter_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"no parameter 'pover' \(did you mean 'power'\?\)"):
        get("iou", {"pover": 2})


def test_the_rollout_is_no_parameter() -> None:
    with pytest.raises(ValueError, match="no parameter 'rollout'"):
        get("exact", {"rollout": 1})


@pytest.mark.parametrize(
    ("params", "named"),
    [({"power": "wide"}, "power is 'wide'"), ({"power": 0}, "power is 0"), ({"coordinates": "px"}, "'px'")],
)
def test_a_parameter_of_the_wrong_type_or_range_is_an_error(params: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        get("iou", params)


def plugin(folder: Path, body: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(f"from rewards import Invalid, Rollout, Score, reward\n\n{body}")
    return path


TEN_LINES = """
@reward("right_and_short")
def right_and_short(rollout: Rollout, limit: int) -> float:
    right = rollout.answer == str(rollout.prompt.ground_truth)
    return float(right and len(rollout.text) < limit)
"""


def test_a_file_is_found_relative_to_the_recipe_and_its_missing_parameter_is_named(tmp_path: Path) -> None:
    plugin(tmp_path, TEN_LINES)
    bound = get("mine.py:right_and_short", {"limit": 5}, tmp_path)
    assert bound(rollout("42", 42)) == 1.0
    assert bound(rollout("<think>so</think>42", 42)) == 0.0
    with pytest.raises(ValueError, match="needs the parameter 'limit'"):
        get("mine.py:right_and_short", {}, tmp_path)


def test_a_file_is_also_found_by_module_and_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, TEN_LINES, "some_module.py")
    about = tmp_path / "some_plugin-1.0.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    about.joinpath("entry_points.txt").write_text("[rl.rewards]\nshort = some_module:right_and_short\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("some_module:right_and_short", "short"):
        assert get(target, {"limit": 5})(rollout("42", 42)) == 1.0
    assert "short" in names()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("absent.py:x", "there is no file"),
        ("mine.py:right_and_shirt", "did you mean 'right_and_short'"),
        ("mine.py:helper", "put @reward"),
        ("broken.py:x", "broken.py cannot be imported: ZeroDivisionError"),
        ("no_such_module:x", "cannot import no_such_module"),
    ],
)
def test_a_missing_target_is_an_error_that_says_what_is_wrong(tmp_path: Path, target: str, said: str) -> None:
    plugin(tmp_path, TEN_LINES + "\n\ndef helper(): ...\n")
    plugin(tmp_path, "1 / 0", "broken.py")
    with pytest.raises(ValueError, match=said):
        get(target, {}, tmp_path)


def test_two_files_may_register_the_same_name_but_then_the_name_alone_is_an_error(tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        plugin(tmp_path, TEN_LINES.replace("right_and_short", "shared_name"), name)
        assert get(f"{name}:shared_name", {"limit": 3}, tmp_path)(rollout("7", 7)) == 1.0
    with pytest.raises(ValueError, match="several rewards are called 'shared_name'"):
        get("shared_name")


def test_a_class_gets_the_parameters_and_is_set_up_once(tmp_path: Path) -> None:
    body = """
from __future__ import annotations

@reward("counting")
class Counting:
    def __init__(self, start: int = 0):
        self.calls, self.setups = start, 0
    def setup(self):
        self.setups += 1
    async def __call__(self, rollout: Rollout) -> Score:
        self.calls += 1
        return Score(0.5, {"calls": self.calls, "setups": self.setups})
"""
    path = tmp_path / "classy.py"
    path.write_text(body.replace("\n@reward", "from rewards import Rollout, Score, reward\n\n@reward"))
    bound = get("classy.py:counting", {"start": "3"}, tmp_path)
    asyncio.run(bound(rollout("", 0)))
    assert asyncio.run(bound(rollout("", 0))) == Score(0.5, {"calls": 5, "setups": 1})


def test_the_registry_and_all_built_in_rewards_import_without_the_heavy_libraries() -> None:
    code = "import sys, rewards; rewards.names(); print({'torch', 'ray', 'vllm', 'sympy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
