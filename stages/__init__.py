"""The training stages, and the code that runs them: plan, loop, chain, curation and evaluation.

STAGES maps the names of the stages in this folder to their classes. The entry point group `rl.stages` refers to this
mapping. Other packages can register their own stages in the same group (rl/recipe/stages.py).

Tested in tests/stages/test_base.py.
"""

from typing import Any

from rl.recipe.stages import registered
from stages.base import Stage
from stages.pacore import Pacore
from stages.rlhf import Rlhf
from stages.rlvr import Rlvr

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Rlvr, Rlhf, Pacore)}
"""Maps the name of each stage to the class of the stage, in the order of the STEP3-VL-10B report."""


def stage_class(name: str) -> type[Stage]:
    """Returns the class of the registered stage with this name."""
    found: Any = registered()[name]
    return found
