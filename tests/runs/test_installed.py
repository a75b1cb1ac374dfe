"""Tests an installation from the wheel, without the clone: the wheel contains everything that the commands need."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import ROOT, metrics, run
from tests.support.judge_server import judge_server

PACKAGES = ("recipes", "rewards", "rl", "rollout", "stages")
NOT_SHIPPED = {
    "recipes/README.md",
    "recipes/scale/README.md",
    "recipes/scale/report.json",
    "recipes/scale/judge_report.json",
}
WITHOUT_CLONE = {"PYTHONPATH": "", "PIP_NO_INDEX": "1"}


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the project's wheel. The dependencies are those of the environment that runs the
    tests."""

    python: Path
    site: Path
    wheel: Path

    def run(self, *arguments: object, folder: Path) -> str:
        """Runs `python -m ...`, asserts that it succeeds, and returns its standard output."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(self.python))  # `run` starts the interpreter sys.executable
            code, out, err = run(*arguments, folder=folder, environment=WITHOUT_CLONE)
        assert code == 0, err
        return out


def pip(*arguments: object) -> None:
    command = [sys.executable, "-I", "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | WITHOUT_CLONE)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installed")
    source, wheels, environment = folder / "source", folder / "wheels", folder / "venv"
    # The source is copied, because setuptools builds inside the source folder. Without the copy, files of earlier
    # builds would get into the wheel.
    for name in (*PACKAGES, "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    shutil.rmtree(source)
    [wheel] = wheels.iterdir()
    venv.create(environment, symlinks=True)
    [site] = environment.glob("lib/python3*/site-packages")
    pip("install", "--no-deps", "--target", site, wheel)
    # dependencies.pth makes the dependencies importable. Python ignores the .pth files inside a folder that was added
    # in this way, so the clone's editable installation has no effect.
    dependencies = Path(sysconfig.get_path("purelib"))
    lines = [str(dependencies)]
    if (dependencies / "torchvision_cpu_hook.py").exists():  # tools/install.py has written it
        lines.append("import torchvision_cpu_hook; torchvision_cpu_hook.install()")
    (site / "dependencies.pth").write_text("\n".join(lines) + "\n")
    return Installation(environment / "bin/python", site, wheel)


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(installed: Installation) -> None:
    files = [file for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file() and file.suffix != ".pyc"]
    wanted = {str(file.relative_to(ROOT)) for file in files} - NOT_SHIPPED
    with zipfile.ZipFile(installed.wheel) as wheel:
        shipped = set(wheel.namelist())
    metadata = {name for name in shipped if name.partition("/")[0].endswith(".dist-info")}
    assert shipped - metadata == wanted
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_wheel_is_as_large_as_the_recipes_readme_says(installed: Installation) -> None:
    megabytes = installed.wheel.stat().st_size / 1e6
    assert f"{megabytes:.0f} MB" in (ROOT / "recipes/README.md").read_text()


def test_packages_and_entry_points_are_the_installed_ones(installed: Installation, tmp_path: Path) -> None:
    code = f"""
import importlib, importlib.metadata, json
files = [importlib.import_module(name).__file__ for name in {PACKAGES}]
points = [p.value for p in importlib.metadata.entry_points(group="vllm.general_plugins")]
print(json.dumps([files, points]))
"""
    command = [installed.python, "-c", code]
    out = subprocess.check_output(command, cwd=tmp_path, env=os.environ | WITHOUT_CLONE, text=True)
    files, plugins = json.loads(out)
    assert files == [str(installed.site / name / "__init__.py") for name in PACKAGES]
    assert plugins.count("rollout.vllm.plugin:register") == 1


def test_the_whole_recipe_and_the_scale_model_are_there(installed: Installation, tmp_path: Path) -> None:
    plan = installed.run("rl.run", "step3_vl", "--profile", "cpu", "--dry-run", folder=tmp_path)
    for path in ("model", "judge", "data/train.jsonl", "data/open-train.jsonl", "genrm.jinja"):
        assert str(installed.site / "recipes/scale" / path) in plan
    assert str(ROOT) not in plan
    assert list(tmp_path.iterdir()) == []


def test_a_users_recipe_can_start_from_a_shipped_recipe(installed: Installation, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: rlvr\n")
    plan = installed.run("rl.run", "mine.yaml", "--profile", "cpu", "--dry-run", folder=tmp_path)
    assert str(installed.site / "recipes/scale/model") in plan and str(ROOT) not in plan


def test_rewards_are_listed(installed: Installation, tmp_path: Path) -> None:
    assert "\nmath_verify: " in installed.run("rewards", "list", folder=tmp_path)


def test_pacore_answers_with_the_shipped_template(installed: Installation, tmp_path: Path) -> None:
    rows = installed.site / "recipes/scale/data/heldout.jsonl"
    with judge_server(lambda request: "It is (B).") as server:
        target = ("--model", "any", "--url", server.url, "--mode", "pacore", "--trajectories", "2", "--limit", "1")
        installed.run("rollout.generate", *target, rows, "out.jsonl", folder=tmp_path)
        assert "It is (B)." in server.prompts[-1]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_one_iteration_trains(installed: Installation, tmp_path: Path) -> None:
    small = ("iterations=1", "prompts_per_iteration=4", "rollouts_per_prompt=4", "data.eval_limit=1")
    installed.run("rl.run", "rlvr", "--profile", "cpu", *small, "--output", "run", folder=tmp_path)
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run/policy/model.safetensors").exists()
