"""Checks three rules: folders import only allowed folders, heavy libraries are imported only in allowed files, and each
source file has a test file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
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
COMMANDS = {
    "rl/run.py",
    "rl/evaluate.py",
    "rl/model/compare.py",
    "rewards/__main__.py",
}  # these files may import every folder
ONE_DOOR = {  # library -> the files that may import it; error messages name the first of these files
    "ray": ["rl/actors.py"],
    "vllm": [
        "rollout/vllm/engine.py",
        "rollout/vllm/plugin.py",
        "rollout/vllm/sampler.py",
        "rollout/vllm/step_vl.py",
        "rollout/weights/host.py",
    ],
    "verl": ["rl/algorithm/verl_bridge.py", "benchmarks/_verl_engine.py"],  # only a benchmark uses the second file
}
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for room in MAY_IMPORT
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imported_names(file: str, source: str) -> Iterator[tuple[str, str]]:
    """Yields (module, imported name) for every import in `source`, also inside functions and under TYPE_CHECKING.

    The name is "" for `import module` and `import_module("module")`.
    """
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, "") for alias in names)
            case ast.ImportFrom(module=module, level=level):
                above = package[: len(package) - level + 1] if level else []
                full_name = ".".join([*above, *([module] if module else [])])
                yield from ((full_name, alias.name) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module, ""


def imported_modules(file: str, source: str) -> list[str]:
    """Returns the full names of the modules that `source` imports, without duplicates."""
    return list(dict.fromkeys(module for module, _ in imported_names(file, source)))


def breaches(file: str, source: str) -> list[str]:
    """Returns one sentence for each import in `file` that is not allowed. `file` is a path from the root."""
    room = file.partition("/")[0]
    allowed = ROOMS if file in COMMANDS else MAY_IMPORT[room]
    found = []
    for module in imported_modules(file, source):
        top = module.partition(".")[0]
        if file not in ONE_DOOR.get(top, [file]):
            found.append(f"{file} imports {module}: go through {ONE_DOOR[top][0]}")
        if top in ROOMS - allowed:
            friends = "only " + " and ".join(sorted(allowed)) if allowed else "nothing of ours"
            found.append(f"{file} imports {module}: {room}/ may import {friends}")
    return found


def file_of(module: str, sources: Mapping[str, str]) -> str | None:
    """Returns the source file of a module, or None if the module is not part of this repository."""
    path = module.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in sources), None)


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns a dict: file -> the files of this repository that the file imports. For `from package import module`, the
    dict contains the file of the module, not the file of the package."""
    return {
        file: {
            imported
            for module, name in imported_names(file, source)
            if (imported := file_of(f"{module}.{name}", sources) or file_of(module, sources))
        }
        for file, source in sources.items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns import cycles, such as `a.py -> b.py -> a.py`. The search is depth-first, so it may miss a cycle that
    shares files with another cycle."""
    found, done, path = [], set(), []

    def visit(file: str) -> None:
        if file in path:
            found.append(" -> ".join([*path[path.index(file) :], file]))
        elif file not in done:
            path.append(file)
            for imported in sorted(graph[file]):
                visit(imported)
            done.add(path.pop())

    for file in graph:
        visit(file)
    return found


def work_in_command(file: str, source: str) -> list[str]:
    """Returns one sentence for each public function that a command file must not have. Such a file may have `parser`,
    `main`, and functions whose only argument is the parsed arguments. All other public functions belong in other files,
    because no file may import a command."""
    return [
        f"{file}: {node.name}() does not belong in a command; move it to a file that others may import"
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and node.name not in ("parser", "main")
        and [ast.unparse(a.annotation) for a in node.args.args if a.annotation] != ["argparse.Namespace"]
    ]


def without_test(sources: Mapping[str, str], root: Path) -> list[str]:
    """Returns one sentence for each missing test file. A source file needs a test file with the same name and folder
    under tests/, or a docstring that says "tested in tests/..."."""
    found = []
    for file, source in sources.items():
        tree, path = ast.parse(source), Path(file)
        if path.name == "__init__.py" and not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in tree.body):
            continue
        test = Path("tests") / path.parent / f"test_{path.stem.strip('_')}.py"
        named = re.split(r"\b[Tt]ested in\s", ast.get_docstring(tree) or "")[1:]
        places = re.findall(r"tests/[\w/]+\.py", " ".join(named)) or [test.as_posix()]
        found += [f"{file}: no {place}" for place in places if not (root / place).exists()]
    return found


def test_every_import_points_inward_and_only_allowed_files_import_heavy_libraries() -> None:
    assert [breach for file, source in SOURCES.items() for breach in breaches(file, source)] == []


def test_no_model_folder_may_bring_code_of_its_own() -> None:
    loads = re.compile(r"\b(?:Auto\w+\.from_pretrained|LLM)\(((?:[^()]|\([^()]*\))*)\)")
    found = [(file, given) for file, source in SOURCES.items() for given in loads.findall(source)]
    assert len(found) > 8
    assert [(file, given) for file, given in found if "trust_remote_code=False" not in given] == []


def test_every_exception_to_these_rules_is_needed() -> None:
    for library, files in ONE_DOOR.items():
        for file in files:
            modules = imported_modules(file, SOURCES[file])
            assert any(module.partition(".")[0] == library for module in modules), f"{file} does not import {library}"
    for file in COMMANDS:
        rooms = {module.partition(".")[0] for module in imported_modules(file, SOURCES[file])} & ROOMS
        assert rooms - MAY_IMPORT[file.partition("/")[0]], f"{file} imports inward only"


def test_imports_between_our_files_make_no_circle() -> None:
    assert circles(import_graph(SOURCES)) == []


def test_no_file_imports_a_command_and_commands_hold_no_work() -> None:
    graph = import_graph(SOURCES)
    assert [f"{file} imports {command}" for file in graph for command in sorted(graph[file] & COMMANDS)] == []
    assert [work for file in sorted(COMMANDS) for work in work_in_command(file, SOURCES[file])] == []


def test_every_source_file_has_a_test_file_of_its_name_or_says_where_it_is_tested() -> None:
    missing = without_test(SOURCES, ROOT)
    assert not missing, "\n".join(["", *missing])


def test_no_test_file_imports_from_another_test_file() -> None:
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    imports = [
        f"{file} imports {module}: move the shared code to tests/support"
        for file, source in sorted(files.items())
        for module in imported_modules(file, source)
        if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")
    ]
    assert not imports, "\n".join(["", *imports])


def test_a_circle_is_reported_with_all_of_its_files() -> None:
    sources = {
        "rl/__init__.py": "",
        "rl/a.py": "import rl.b",
        "rl/b.py": "if TYPE_CHECKING:\n    from rl.c import C",
        "rl/c.py": "def f():\n    from rl import a, d",
        "rl/d.py": "import torch",
    }
    assert circles(import_graph(sources)) == ["rl/a.py -> rl/b.py -> rl/c.py -> rl/a.py"]
    assert circles(import_graph(sources | {"rl/c.py": "from rl import d"})) == []


def test_a_command_may_have_functions_of_its_arguments_only() -> None:
    source = (
        "def parser(): ...\ndef main(arguments): ...\ndef _any(x): ...\ndef config_of(args: argparse.Namespace): ..."
    )
    assert work_in_command("rl/run.py", source) == []
    assert work_in_command("rl/run.py", "def score(rows: list): ...") == [
        "rl/run.py: score() does not belong in a command; move it to a file that others may import"
    ]


def test_a_file_without_test_is_named_with_the_path_that_its_test_should_have(tmp_path: Path) -> None:
    (tmp_path / "tests/rl").mkdir(parents=True)
    (tmp_path / "tests/rl/test_a.py").touch()
    sources = {
        "rl/__init__.py": '"""Only a docstring."""',
        "rl/a.py": "",
        "rl/b.py": '"""B. Tested in tests/rl/test_a.py."""',
        "rl/c.py": '"""C. Tested in tests/rl/test_a.py and tests/rl/test_none.py."""',
        "rl/_d.py": "",
    }
    assert without_test(sources, tmp_path) == ["rl/c.py: no tests/rl/test_none.py", "rl/_d.py: no tests/rl/test_d.py"]


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
        ("rl/run.py", "import stages.rlvr", []),
        ("rl/run.py", "import ray", ["rl/run.py imports ray: go through rl/actors.py"]),
        ("rl/types.py", "import rayon, vllm_like", []),
    ],
)
def test_a_forbidden_import_is_reported_with_the_file_to_use(file: str, source: str, said: list[str]) -> None:
    assert breaches(file, source) == said


@pytest.mark.parametrize("module", ["rl.config", "rl.types", "rewards", "rollout.data.rows"])
def test_light_modules_load_no_heavy_library(module: str) -> None:
    heavy = ("torch", "ray", "vllm", "verl")
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", ""), f"{module} must import without {heavy}"
