"""Keeps the rooms apart: which folder may import which, and which files the heavy libraries come in by."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"rl", "rewards", "rollout", "stages"}
MAY_IMPORT = {
    "rl": {"rl"},
    "rewards": {"rewards", "rl"},
    "rollout": {"rollout", "rl"},
    "stages": ROOMS,
    "recipes": ROOMS,
    "benchmarks": ROOMS,
    "tools": set(),
}
LOOK_OUTWARD = {"rl/run.py", "rl/evaluate.py", "rewards/__main__.py"}  # entry points: they pick a stage
ONE_DOOR = {  # the first file is the one to go through
    "ray": ["rl/actors.py", "rl/run.py"],
    "vllm": [
        "rollout/vllm/engine.py",
        "rollout/vllm/plugin.py",
        "rollout/vllm/sampler.py",
        "rollout/vllm/step_vl.py",
        "rollout/weights/host.py",
    ],
    "verl": ["rl/algorithm/verl_bridge.py", "benchmarks/_verl_engine.py"],  # the second is what we are compared with
}


def imported_modules(file: str, source: str) -> Iterator[str]:
    """Full names of all modules that `source` imports anywhere, by statement or by `import_module("...")`."""
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, level=level):
                above = package[: len(package) - level + 1] if level else []
                yield ".".join([*above, *([module] if module else [])])
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def breaches(file: str, source: str) -> list[str]:
    """One sentence per import of `file` (path from the root) that the rules above forbid."""
    room = file.partition("/")[0]
    allowed = ROOMS if file in LOOK_OUTWARD else MAY_IMPORT[room]
    found = []
    for module in imported_modules(file, source):
        top = module.partition(".")[0]
        if file not in ONE_DOOR.get(top, [file]):
            found.append(f"{file} imports {module}: go through {ONE_DOOR[top][0]}")
        if top in ROOMS - allowed:
            friends = "only " + " and ".join(sorted(allowed)) if allowed else "nothing of ours"
            found.append(f"{file} imports {module}: {room}/ may import {friends}")
    return found


def test_every_import_points_inward_and_heavy_libraries_come_through_their_door() -> None:
    files = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
    assert files
    names = {path: path.relative_to(ROOT).as_posix() for path in files}
    assert [breach for path in files for breach in breaches(names[path], path.read_text())] == []


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("stages/rlvr.py", "import vllm", ["stages/rlvr.py imports vllm: go through rollout/vllm/engine.py"]),
        (
            "rl/learner/policy.py",
            "def f():\n    from ray.util import get",
            ["rl/learner/policy.py imports ray.util: go through rl/actors.py"],
        ),
        (
            "rewards/iou.py",
            "from rollout.data.rows import read",
            ["rewards/iou.py imports rollout.data.rows: rewards/ may import only rewards and rl"],
        ),
        (
            "rl/model/heads.py",
            "import importlib\nimportlib.import_module('stages.loop')",
            ["rl/model/heads.py imports stages.loop: rl/ may import only rl"],
        ),
        (
            "tools/install.py",
            "import rl",
            ["tools/install.py imports rl: tools/ may import nothing of ours"],
        ),
        ("rl/model/heads.py", "from ..types import Prompt\nfrom . import config", []),
        ("rl/run.py", "import ray, stages.rlvr", []),
        ("rl/types.py", "import rayon, vllm_like", []),
    ],
)
def test_a_breach_is_named_with_the_way_to_go(file: str, source: str, said: list[str]) -> None:
    assert breaches(file, source) == said


@pytest.mark.parametrize("module", ["rl.config", "rl.types", "rewards", "rollout.data.rows"])
def test_light_modules_load_no_heavy_library(module: str) -> None:
    heavy = ("torch", "ray", "vllm", "verl")
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", ""), f"{module} must import without {heavy}"
