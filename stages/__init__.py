"""The stages, and what runs them: plan, loop, chain, curation and evaluation.

STAGES is the registry. Recipes find it through the entry point group `rl.stages` (rl/recipe/stages.py).
"""

from stages.base import Stage
from stages.pacore import Pacore
from stages.rlhf import Rlhf
from stages.rlvr import Rlvr

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Rlvr, Rlhf, Pacore)}
"""Every stage by its name, in the order of the report."""
