"""Tests runs whose reward calls a judge: a judge whose server stops answering for a while or forever, and a judge that
the run itself serves."""

import gzip
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import ROOT, Command, metrics, run, wait_for_iteration
from tests.support.judge_server import Reply, judge_server

SMALL = (
    *("rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", "prompts_per_iteration=4", "rollouts_per_prompt=4"),
    "data.eval=[]",
)
ALIKE = {"reasoning": "Both say so.", "grade_a": 6, "grade_b": 6}


def rows(folder: Path, *, taught: bool = False) -> Path:
    """Writes rows with a few sums from the scale model's data. The rows have ground truths. If `taught` is True, they
    have a teacher's answers instead."""
    lines = (ROOT / "recipes/scale/data/train.jsonl").read_text().splitlines()
    sums = [row for row in map(json.loads, lines) if row["task"] == "arithmetic"][:16]
    if taught:
        sums = [{**row, "ground_truth": None, "reference": f"It is {row['ground_truth']}."} for row in sums]
    file = folder / f"sums{'-taught' if taught else ''}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return file


class Judge:
    """A judge that gives the same grade to all responses. After the first iteration, the judge fails for `away_s`
    seconds."""

    def __init__(self, run_folder: Path, away_s: float) -> None:
        self.run_folder, self.away_s, self.since = run_folder, away_s, float("inf")

    def __call__(self, request: dict[str, Any]) -> Reply:
        if self.since == float("inf") and any(line["iteration"] == 1 for line in metrics(self.run_folder)):
            self.since = time.monotonic()
        away = self.since <= time.monotonic() < self.since + self.away_s
        return Reply("restarting", status=503) if away else Reply(ALIKE)


def judged(folder: Path, away_s: float, max_wait: float) -> tuple[int, str, str]:
    """Runs the stage RLHF with the scripted judge."""
    taught = rows(folder, taught=True)
    with judge_server(Judge(folder / "run", away_s)) as server:
        return run(
            *SMALL,
            *("--output", folder / "run", "stage=rlhf", "iterations=2", f"data.train={taught}", f"data.eval={taught}"),
            "rewards.arithmetic={use: genrm, params: {endpoint: judge}, penalties: [language_consistency]}",
            f"endpoints.judge={{url: '{server.url}', model: judge, retries: 0, max_wait: {max_wait}}}",
        )


@pytest.mark.slow
def test_a_run_waits_for_a_judge_that_stops_answering_and_loses_nothing(tmp_path: Path) -> None:
    code, out, err = judged(tmp_path, away_s=5, max_wait=120)
    assert code == 0, err
    assert "endpoint judge does not answer (HTTP 503: restarting" in out
    assert "everything up to iteration 1 is saved" in out and "endpoint judge is back after" in out
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [0, 1, 2]
    first, *lines = metrics(tmp_path / "run")
    assert [line["reward/invalid_fraction"] for line in lines] == [0, 0]
    assert [line["stage"] for line in lines] == ["rlhf", "rlhf"]
    assert first["eval/win_rate"] == lines[-1]["eval/win_rate"] == 0.5  # all comparisons are ties
    assert all(line["genrm/win_rate"] == 0.5 and line["genrm/order_agreement"] == 1 for line in lines)
    assert all("penalty/language_consistency" in line for line in lines)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["000001", "000002"]


@pytest.mark.slow
def test_a_run_whose_judge_never_answers_again_saves_and_names_the_judge(tmp_path: Path) -> None:
    code, out, err = judged(tmp_path, away_s=1e6, max_wait=3)
    assert code == 1
    assert "endpoint 'judge' has not answered for" in err and "HTTP 503: restarting" in err
    assert "Traceback" not in err
    assert f"stopped after iteration 1; go on with: python -m rl.run --resume {tmp_path / 'run'}" in out
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["000001"]


def test_the_rlhf_recipe_trains_with_the_judge_that_it_serves(tmp_path: Path) -> None:
    code, _, err = run(
        *("rl.run", ROOT / "recipes/rlhf.yaml", "--profile", "cpu", "--output", tmp_path / "run", "iterations=1"),
        *("prompts_per_iteration=4", "rollouts_per_prompt=4", "data.eval_limit=4"),
    )
    assert code == 0, err
    first, *lines = metrics(tmp_path / "run")
    assert {"eval/describing", "eval/counting", "eval/win_rate"} <= first.keys() & lines[-1].keys()
    assert all(line["reward/invalid_fraction"] == 0 and line["genrm/order_agreement"] > 0.5 for line in lines)
    assert all({"genrm/win_rate", "genrm/score_p50", "genrm/score_p90"} <= line.keys() for line in lines)
    with gzip.open(tmp_path / "run/rollouts/000001.jsonl.gz", "rt") as file:
        reasons = [json.loads(sample)["details"]["reasons"] for sample in file]
    assert all("A " in one and "B " in one for both in reasons for one in both)


# The option disable_any_whitespace forbids extra spaces in a verdict. Without this option, the scale model writes many
# spaces.
TERSE = '{"backend": "xgrammar", "disable_any_whitespace": true}'
OPTIONS = f"{{max-model-len: 256, dtype: float32, structured-outputs-config: '{TERSE}'}}"
PLUGIN = """
from typing import Literal

from pydantic import BaseModel

from rewards import Rollout, Score, reward
from rewards.endpoint import EndpointName, endpoint


class Verdict(BaseModel):
    verdict: Literal["fine", "poor"]


@reward("asked")
class Asked:
    \"\"\"1.0 if the judge says fine.\"\"\"

    def __init__(self, judge: EndpointName):
        self.name = judge

    def setup(self):
        self.judge = endpoint(self.name)

    async def __call__(self, rollout: Rollout):
        asked = [{"role": "user", "content": rollout.answer or "nothing"}]
        verdict, text = await self.judge.ask(asked, answer=Verdict, max_tokens=60, temperature=1.0, seed=1)
        return Score(float(verdict.verdict == "fine"), {"said": text})
"""


@pytest.mark.slow
def test_a_judge_that_the_run_serves_is_started_again_when_it_dies(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(PLUGIN)
    command = Command(
        *SMALL,
        *("--output", tmp_path / "run", f"data.train={rows(tmp_path)}", "iterations=3"),
        f"rewards.arithmetic={{use: '{tmp_path}/asks.py:asked', params: {{judge: own}}}}",
        f"endpoints.own={{model: {ROOT}/recipes/scale/model, serve: {OPTIONS}, retries: 1}}",
    )
    wait_for_iteration(tmp_path / "run", 1, command)
    (server,) = [pid for pid, line in command.marked() if "-m vllm.entrypoints.openai.api_server" in line]
    os.kill(server, signal.SIGKILL)
    code, out, err = command.finish()
    assert code == 0, err
    assert "judge own, which this run serves, has died and is started again (restart 1 of 10)" in out
    assert "endpoint own is back after" in out and command.left_behind() == []
    lines = metrics(tmp_path / "run")[1:]
    assert [line["reward/invalid_fraction"] for line in lines] == [0, 0, 0]
    with gzip.open(tmp_path / "run/rollouts/000001.jsonl.gz", "rt") as file:
        said = [json.loads(json.loads(sample)["details"]["said"])["verdict"] for sample in file]
    assert len(said) == 16 and set(said) <= {"fine", "poor"}
