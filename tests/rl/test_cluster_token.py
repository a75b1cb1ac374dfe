"""Tests that a Ray cluster that a run starts requires a random token, and that a user's own choice is respected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl.cluster_token import CHOICES, set_token

STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="error")
"""
# The run starts a cluster, and a process of another user, who does not know the token, tries to join it.
RUN = f"""
import os, subprocess, sys
from rl.actors import cluster
import ray
with cluster():
    address = ray.get_runtime_context().gcs_address
    strangers = {{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}} | {{"RAY_AUTH_MODE": "disabled"}}
    knows = os.environ | {{"RAY_ADDRESS": address}}
    for environment in (strangers, knows):
        command = [sys.executable, "-c", {STRANGER!r}, address]
        print(subprocess.run(command, env=environment, capture_output=True).returncode)
"""


def test_each_process_gets_another_token() -> None:
    first, second = dict[str, str](), dict[str, str]()
    set_token(first)
    set_token(second)
    assert first["RAY_AUTH_MODE"] == "token" and len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize("chosen", sorted(CHOICES))
def test_a_variable_that_the_user_has_set_is_respected(chosen: str) -> None:
    environment = {chosen: "1"}
    set_token(environment)
    assert environment == {chosen: "1"}


def test_a_local_cluster_refuses_a_process_without_the_token_and_writes_nothing_to_the_home_folder(
    tmp_path: Path,
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", RUN], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, admitted = done.stdout.split()
    assert refused != "0" and admitted == "0", done.stderr
    assert not (tmp_path / ".ray").exists()
