"""Runs Jinja templates that come from model folders, recipes and plugins. They run in Jinja's immutable sandbox,
because a template without a sandbox can run any code."""

from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment


def template_environment(folder: Path | None = None) -> ImmutableSandboxedEnvironment:
    """Returns an environment in which templates can read their variables and call harmless functions. Anything else,
    such as Python's internal attributes or changes of a list, raises jinja2.sandbox.SecurityError when the template is
    rendered. A variable that does not exist is an error.

    Args:
        folder: the folder from which templates can include other templates (optional).
    """
    return ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder) if folder else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
