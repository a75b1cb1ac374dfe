"""Tests tools/install.py and the environment that it has made: torchvision hook, pinned versions, our vLLM plugin."""

import importlib.util
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
HOOK_FOLDER = ROOT / "tools"
cpu_torch_only = pytest.mark.skipif(torch.version.cuda is not None, reason="the hook is for CPU builds of torch")


def run_python(code: str, *arguments: str) -> str:
    """Runs the code in a new interpreter of this environment and returns the output."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installer() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "install.py"))


def test_torchvision_imports_in_a_new_interpreter_without_torch() -> None:
    code = """
        import sys
        torch_at_start = "torch" in sys.modules
        from torchvision import transforms
        print(torch_at_start, transforms.Resize(4).size)
    """
    assert run_python(code) == "False 4"


@cpu_torch_only
def test_looking_for_torchvision_does_not_import_torch() -> None:
    code = """
        import importlib.util, sys
        print(importlib.util.find_spec("torchvision").name, "torch" in sys.modules)
    """
    assert run_python(code) == "torchvision False"


# The hook treats the fake package as torchvision. `operators` lists the operators that torch knows when the package's
# __init__ starts.
FAKE_INIT = """
import torch
operators = sorted(name for name in ("nms", "qnms") if hasattr(torch.ops.torchvision, name))
"""
IMPORT_FAKE = """
    import sys
    sys.path[:0] = sys.argv[1:]
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "TorchvisionFinder"]
    import torchvision_cpu_hook as hook
    hook.install()
    import torchvision
    print(torchvision.operators, len(hook._declared))
"""


def fake_torchvision(folder: Path) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_INIT)
    return package


@cpu_torch_only
def test_a_torchvision_whose_extension_does_not_load_gets_both_operators(tmp_path: Path) -> None:
    package = fake_torchvision(tmp_path)
    (package / "_C.so").write_bytes(b"built for something else")
    assert run_python(IMPORT_FAKE, str(HOOK_FOLDER), str(tmp_path)) == "['nms', 'qnms'] 1"


@cpu_torch_only
def test_a_working_torchvision_is_not_changed(tmp_path: Path) -> None:
    package = fake_torchvision(tmp_path)
    loads = importlib.util.find_spec("safetensors._safetensors_rust")  # any compiled library that can be loaded
    assert loads is not None and loads.origin is not None
    shutil.copyfile(loads.origin, package / "_C.so")
    assert run_python(IMPORT_FAKE, str(HOOK_FOLDER), str(tmp_path)) == "[] 0"


def test_the_metadata_of_a_half_installed_package_are_removed(installer: dict[str, Any], tmp_path: Path) -> None:
    for name in ("whole-1.0.dist-info", "half-1.0.dist-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").touch()
    (tmp_path / "whole-1.0.dist-info" / "INSTALLER").touch()
    installer["forget_half_installed"](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


SYSTEMS = [  # platform.system(), platform.machine(), expected part of the message
    ("Darwin", "arm64", "vLLM, which generates all responses, has no package for macOS"),
    ("Darwin", "x86_64", "vLLM, which generates all responses, has no package for macOS"),
    ("Windows", "AMD64", "vLLM has no package for Windows"),
    ("Linux", "ppc64le", "vLLM, which generates all responses, has no package for this system"),
]


@pytest.mark.parametrize(("system", "machine", "reason"), SYSTEMS)
def test_on_a_system_without_vllm_the_installer_stops_before_it_creates_anything(
    system: str, machine: str, reason: str, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(ROOT / "tools/install.py", tools)
    code = f"""
        import platform, runpy, sys
        platform.system, platform.machine = (lambda: {system!r}), (lambda: {machine!r})
        sys.modules["fcntl"] = None  # as on Windows
        sys.argv = ["install.py"]
        runpy.run_path({str(tools / "install.py")!r}, run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"environment: {system} on {machine} is not supported; nothing was installed.\n")
    assert reason in done.stderr and "Linux on x86-64 is supported" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["tools", "install.py"]


def test_linux_on_arm_prints_a_warning(installer: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    installer["check_system"]("Linux", "aarch64")
    assert "nothing has been run on it" in capsys.readouterr().out


def test_linux_on_x86_is_supported(installer: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    installer["check_system"]("Linux", "x86_64")
    assert capsys.readouterr().out == ""


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Returns package -> version for the lines of the file that apply to this machine."""
    lines = [line for line in constraints.read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_constraints_allow_what_pyproject_asks_for(installer: dict[str, Any], kind: str) -> None:
    versions = pinned_versions(installer["constraints"](kind))
    for wanted in map(Requirement, installer["project_requirements"](kind)):
        if wanted.marker is None or wanted.marker.evaluate():
            version = versions.get(canonicalize_name(wanted.name), "0")
            assert wanted.specifier.contains(version), f"{wanted}, pinned {version}: run `make lock`"


def test_vllm_finds_our_plugin() -> None:
    code = """
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.model_executor.models import ModelRegistry
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        print(ModelRegistry.models["StepVLForConditionalGeneration"].module_name)
        print("host" in WeightTransferEngineFactory._registry)
    """
    assert run_python(code).splitlines()[-2:] == ["rollout.vllm.step_vl", "True"]


def test_make_demo_runs_the_main_job_on_the_cpu_profile() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tools/install.py" in done.stdout
    assert "-m rl.run recipes/rlvr.yaml --profile cpu" in done.stdout
