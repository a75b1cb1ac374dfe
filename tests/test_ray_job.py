"""The same command as a job of a Ray cluster that somebody else started: it joins, and leaves the cluster running."""

import os
import subprocess
import sys
from pathlib import Path

from tests.command import ROOT, metrics
from tests.test_run import SMALL

BIN = Path(sys.executable).parent


def ray(*arguments: str, timeout: float = 300) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_ADDRESS": ""}
    done = subprocess.run(
        [BIN / "ray", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_submitted_job_joins_the_cluster_trains_and_writes_where_it_was_told(tmp_path: Path) -> None:
    ray("start", "--head", "--port=0", "--dashboard-port=8299", "--include-dashboard=true", "--disable-usage-stats")
    try:
        recipe = ["python", "-m", "rl.run", "recipes/rlvr.yaml", *map(str, SMALL[2:]), "iterations=1"]
        out = ray(
            "job", "submit", "--address", "http://127.0.0.1:8299", "--working-dir", ".", "--", *recipe,
            "--output", str(tmp_path / "run"),
        )  # fmt: skip
        assert "succeeded" in out
        assert [m["iteration"] for m in metrics(tmp_path / "run")] == [0, 1]
        assert (tmp_path / "run/policy/config.json").is_file()
    finally:
        ray("stop", "--force")
