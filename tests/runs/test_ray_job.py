"""Tests rl.run as a job of a running Ray cluster. The run joins the cluster and does not stop it."""

import os
import secrets
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import PATIENCE, SMALL_RUN, Command, metrics
from tests.support.patience import Deadline

# The tests set a token, so that the cluster requires a token on every machine.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


PLUGIN = "rewards.arithmetic={use: 'examples/brief_rewards/brief_rewards/__init__.py:right_and_brief'}"


@pytest.fixture
def cluster() -> Iterator[tuple[str, Command]]:
    """Starts a cluster with `ray start --head`. Yields the address of the job server, and the cluster's process."""
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        port, agent = (free.getsockname()[1] for free in (first, second))
    # By default, the job agents of all clusters on a machine listen on the same port, and only one of them can.
    ports = ("--port=0", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent}")
    options = ("--head", "--block", *ports, "--disable-usage-stats")
    # The job runs the first `python` in the PATH of the cluster's node. So the PATH begins with the folder of the
    # `python` that runs this test.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    head = Command("ray.scripts.scripts", "start", *options, environment={"PATH": path, **TOKEN})
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/version", head)
        yield address, head
    finally:
        head.process.send_signal(signal.SIGTERM)
        head.finish()
        assert head.left_behind() == []


def _wait_for(url: str, head: Command) -> None:
    deadline = Deadline(PATIENCE)
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # the server runs: it refuses this request only because the token is missing
        except OSError:
            assert head.process.poll() is None, head.finish()
            assert not deadline.passed()
            time.sleep(0.5)


def test_a_submitted_job_joins_the_cluster_trains_and_writes_to_the_given_folder(
    cluster: tuple[str, Command], tmp_path: Path
) -> None:
    dashboard, head = cluster
    small = (*map(str, SMALL_RUN[2:]), "iterations=1", "data.eval=[]", PLUGIN)
    recipe = ["python", "-m", "rl.run", "recipes/rlvr.yaml", *small]
    submit = ("ray.scripts.scripts", "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *recipe)
    deadline = Deadline(PATIENCE)
    while True:
        code, out, err = Command(*submit, "--output", tmp_path / "run", environment=TOKEN).finish()
        if "No available agent" not in err or deadline.passed():  # the error of a cluster that is still starting
            break
        time.sleep(1)
    assert code == 0, out[-4000:] + err[-4000:]
    assert [m["iteration"] for m in metrics(tmp_path / "run")] == [0, 1]
    # The job has found the file of the reward.
    assert "reward/arithmetic/right_and_brief" in metrics(tmp_path / "run")[1]
    assert (tmp_path / "run/policy/config.json").is_file()
    assert head.process.poll() is None  # the cluster still runs after the job
