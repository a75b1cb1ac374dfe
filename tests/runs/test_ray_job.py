"""Tests rl.run as a job of a running Ray cluster. The run joins the cluster and does not stop it."""

import os
import secrets
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rl.record.checkpoints import damage
from tests.support.command import PATIENCE, SMALL_RUN, Command, metrics, wait_for_iteration
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
    environment = {"PATH": path, "RAY_JOB_STOP_WAIT_TIME_S": "600", **TOKEN}
    head = Command("ray.scripts.scripts", "start", *options, environment=environment)
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


def submit(dashboard: str, *options: str, job: Sequence[str] = ()) -> str:
    """Submits a small run and returns what `ray job submit` prints. `job` has options for `ray job submit`."""
    recipe = ("python", "-m", "rl.run", "recipes/rlvr.yaml", *map(str, SMALL_RUN[2:]), *options)
    deadline = Deadline(PATIENCE)
    while True:
        code, out, err = ray_job("submit", dashboard, *job, "--working-dir", ".", "--", *recipe)
        if "No available agent" not in err or deadline.passed():  # the error of a cluster that is still starting
            break
        time.sleep(1)
    assert code == 0, out[-4000:] + err[-4000:]
    return out


def ray_job(command: str, dashboard: str, *arguments: str) -> tuple[int, str, str]:
    """Runs `ray job COMMAND`. Returns exit code, standard output and standard error."""
    name = "ray.scripts.scripts"
    return Command(name, "job", command, "--address", dashboard, *arguments, environment=TOKEN).finish()


def test_a_submitted_job_joins_the_cluster_trains_and_writes_to_the_given_folder(
    cluster: tuple[str, Command], tmp_path: Path
) -> None:
    dashboard, head = cluster
    submit(dashboard, "iterations=1", "data.eval=[]", PLUGIN, "--output", str(tmp_path / "run"))
    assert [m["iteration"] for m in metrics(tmp_path / "run")] == [0, 1]
    # The job has found the file of the reward.
    assert "reward/arithmetic/right_and_brief" in metrics(tmp_path / "run")[1]
    assert (tmp_path / "run/policy/config.json").is_file()
    assert head.process.poll() is None  # the cluster still runs after the job


@pytest.mark.slow
def test_ray_job_stop_saves_the_run(cluster: tuple[str, Command], tmp_path: Path) -> None:
    dashboard, head = cluster
    options = ("iterations=50", "checkpoint.every=100", "data.eval=[]", "--output", str(tmp_path / "run"))
    submit(dashboard, *options, job=("--no-wait", "--submission-id", "stopped"))
    wait_for_iteration(tmp_path / "run", 2, head)
    code, out, err = ray_job("stop", dashboard, "stopped")
    assert code == 0 and "was stopped" in out + err, out + err
    _, log, _ = ray_job("logs", dashboard, "stopped")
    assert "interrupted after iteration" in log and "Traceback" not in log, log
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert damage(checkpoint) is None and int(checkpoint.name) >= 2
    assert head.process.poll() is None
