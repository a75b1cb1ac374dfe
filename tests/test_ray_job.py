"""The same command as a job of a Ray cluster that somebody else started: it joins, and leaves the cluster running."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import PATIENCE, ROOT, Command, metrics
from tests.test_run import SMALL


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The job server's address of a cluster started with `ray start --head`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--head", "--block", "--port=0", f"--dashboard-port={port}", "--disable-usage-stats")
    # `python` in a job is the one of the node's environment
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    head = Command("ray.scripts.scripts", "start", *options, PATH=path)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/version", head)
        yield address
    finally:
        head.process.send_signal(signal.SIGTERM)
        head.finish()
        assert head.left_behind() == []


def _wait_for(url: str, head: Command) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert head.process.poll() is None, head.finish()
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_submitted_job_joins_the_cluster_trains_and_writes_where_it_was_told(dashboard: str, tmp_path: Path) -> None:
    recipe = ["python", "-m", "rl.run", "recipes/rlvr.yaml", *map(str, SMALL[2:]), "iterations=1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", dashboard),
            *("--working-dir", ".", "--", *recipe, "--output", str(tmp_path / "run")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [m["iteration"] for m in metrics(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run/policy/config.json").is_file()
    nodes = urllib.request.urlopen(f"{dashboard}/nodes?view=summary", timeout=30).read()
    assert b"ALIVE" in nodes  # the job left the cluster as it found it
