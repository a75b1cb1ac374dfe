"""Tests tools/licences.py: reading the licence of a package, judging the licence, and checking this environment."""

import importlib.metadata
import runpy
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "licences.py"


@pytest.fixture(scope="module")
def check() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def stated(**fields: str | list[str]) -> Message:
    """Returns package metadata with these fields, for example License_Expression="MIT"."""
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


def test_no_dependency_has_a_licence_that_forbids_its_use(check, capsys: pytest.CaptureFixture) -> None:
    assert check["main"]() == 0, capsys.readouterr().err
    assert "pycountry: LGPL-2.1-only\n" in capsys.readouterr().out


def test_dependencies_of_the_packages_are_checked_too(check) -> None:
    checked = {canonicalize_name(name) for name in check["installed_packages"]()}
    needed = [Requirement(line) for name in checked for line in importlib.metadata.requires(name) or ()]
    active = {canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})}
    assert {name for name in active if check["is_installed"](name)} <= checked


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
def test_a_licence_is_read_from_the_field_that_states_it(check, fields: dict[str, Any], licence: str) -> None:
    assert check["licence_of"]("some-package", stated(**fields)) == licence


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
def test_strong_copyleft_and_unknown_licences_are_refused(check, licence: str, allowed: bool) -> None:
    assert check["is_allowed"]("some-package", licence) is allowed
