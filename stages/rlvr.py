"""The stage RLVR: training with verifiable rewards on unchanged rows.

Tested in tests/stages/test_loop.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from stages.base import Stage


class Rlvr(Stage):
    """Trains on verifiable rewards. All defaults except critic_minibatches are from the STEP3-VL-10B report."""

    name = "rlvr"
    defaults: ClassVar[Mapping[str, Any]] = {
        "iterations": 600,
        "prompts_per_iteration": 512,
        "rollouts_per_prompt": 16,
        "max_sequence_length": 24_576,
        "ppo": {"minibatches": 4, "critic_minibatches": 4},
    }
