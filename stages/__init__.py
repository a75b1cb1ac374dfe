"""The stages, and what runs them: plan, loop, chain, curation and evaluation.

STAGES is the registry of the stages in this folder. It is found through the entry point group `rl.stages`, in which
other packages can register stages of their own (rl/recipe/stages.py).

Tested in tests/stages/test_base.py.
"""

from typing import Any

from rl.recipe.stages import registered
from stages.base import Stage
from stages.pacore import Pacore
from stages.rlhf import Rlhf
from stages.rlvr import Rlvr

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Rlvr, Rlhf, Pacore)}
"""Stages by their names, in the order of the report."""


def stage_class(name: str) -> type[Stage]:
    """The registered stage of this name."""
    found: Any = registered()[name]
    return found
