"""The stage RLVR: verifiable rewards on the rows as they are.

Tested in tests/stages/test_loop.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from stages.base import Stage


class Rlvr(Stage):
    """See stages.base.Stage. The defaults are the report's table; critic_minibatches is a reconstruction."""

    name = "rlvr"
    defaults: ClassVar[Mapping[str, Any]] = {
        "iterations": 600,
        "prompts_per_iteration": 512,
        "rollouts_per_prompt": 16,
        "max_sequence_length": 24_576,
        "ppo": {"minibatches": 4, "critic_minibatches": 4},
    }
