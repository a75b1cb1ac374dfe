"""Tests that waiting threads of a run do not spin for long. If a user has set how threads wait, this setting stays."""

import subprocess
import sys

import pytest

from rl.openmp import CHOICES, LIMITS, limit_spinning


def test_the_limits_are_set_if_the_user_has_set_no_variable() -> None:
    environment = {"OMP_NUM_THREADS": "2"}
    limit_spinning(environment)
    assert environment == {"OMP_NUM_THREADS": "2"} | LIMITS


@pytest.mark.parametrize("chosen", sorted(CHOICES))
def test_a_variable_that_the_user_has_set_is_respected(chosen: str) -> None:
    environment = {chosen: "1"}
    limit_spinning(environment)
    assert environment == {chosen: "1"}


@pytest.mark.parametrize("module", ["rl.run", "rewards", "benchmarks.__main__"])
def test_importing_a_command_sets_the_limits_before_torch_is_loaded(module: str) -> None:
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            assert os.environ["GOMP_SPINCOUNT"] == {LIMITS["GOMP_SPINCOUNT"]!r}
sys.meta_path.insert(0, Watch())
import {module}, torch
"""
    clean = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
