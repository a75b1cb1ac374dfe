"""Tests a stage from a user's package. An entry point registers the stage. The commands of this project run the
stage."""

import json
from pathlib import Path

import pytest

from tests.support.command import metrics, run

STAGE = """
from stages.base import Stage


class Hardest(Stage):
    name = "hardest"
    own_metrics = {"hardest/tokens": "Tokens of the longest prompt."}
    defaults = {
        "iterations": 2,
        "prompts_per_iteration": 4,
        "rollouts_per_prompt": 4,
        "max_sequence_length": 128,
        "ppo": {"minibatches": 1, "critic_minibatches": 1},
    }

    @classmethod
    def plan_lines(cls, config, left_out=0):
        return ["order      longest question first"]

    def prompts_for_iteration(self, prompts, iteration):
        return sorted(prompts, key=lambda prompt: -self.tools.chat.length(prompt))

    def metrics(self, scored):
        return {"hardest/tokens": float(self.tools.chat.length(scored[0].rollout.prompt))}


STAGES = {Hardest.name: Hardest}
"""
SMALL = ("--profile", "cpu", "prompts_per_iteration=4", "rollouts_per_prompt=4", "data.eval_limit=2")


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    """Writes a package that contains a stage, a recipe for this stage and a recipe for a chain. Returns the environment
    variable that makes the package importable."""
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info/entry_points.txt").write_text("[rl.stages]\nmine = mine:STAGES\n")
    (site / "mine.py").write_text(STAGE)
    (tmp_path / "hardest.yaml").write_text("base: rlvr\nstage: hardest\n")
    (tmp_path / "chain.yaml").write_text("chain: [rlvr, hardest.yaml]\n")
    return {"PYTHONPATH": str(site)}


def test_the_plan_of_the_users_stage_is_printed_and_its_name_is_listed(package: dict[str, str], tmp_path: Path) -> None:
    given = ("rl.run", "hardest.yaml", *SMALL, "--dry-run")
    code, out, err = run(*given, folder=tmp_path, environment=package)
    assert (code, err) == (0, "") and "order      longest question first" in out
    code, _, err = run(*given, "stage=easiest", folder=tmp_path, environment=package)
    assert code == 2 and "no stage easiest; the stages are" in err and "hardest" in err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_chain_trains_the_users_stage_and_evaluates_the_policy(package: dict[str, str], tmp_path: Path) -> None:
    sizes = ("iterations=1", "eval.sampled_rows=2", "--output", "run")
    code, out, err = run("rl.run", "chain.yaml", *SMALL, *sizes, folder=tmp_path, environment=package, timeout=1200)
    assert code == 0, (out, err)
    lines = metrics(tmp_path / "run")
    steps = [(line["stage"], line["iteration"]) for line in lines]
    assert steps == [("rlvr", 0), ("rlvr", 1), ("hardest", 0), ("hardest", 1)]
    assert lines[-1]["hardest/tokens"] > 0
    table = json.loads((tmp_path / "run/final/table.json").read_text())
    assert list(table["held_out"]) == ["start", "rlvr", "hardest"]
    assert {row["mode"] for row in table["sampled"]} >= {"SeRe pass@1", "PaCoRe@16"}
