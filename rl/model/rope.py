"""Finds rotary positions that transformers and vLLM compute differently.

The learner uses transformers' decoders, the engines use vLLM's. If they differ in positions, PPO learns from wrong
logprobs. The formulas were read in transformers 5.10 (modeling_rope_utils.py) and vLLM 0.28 (rotary_embedding).
"""

import math
from collections.abc import Mapping
from typing import Any

SAME = ("default", "linear", "llama3", "yarn")
"""The types of positions that both libraries compute in the same way."""


def check_rope(rope: Mapping[str, Any]) -> None:
    """Raises ValueError if transformers and vLLM would compute different positions from a config's
    `rope_parameters`."""
    kind = rope.get("rope_type", "default")
    if kind not in SAME:
        raise ValueError(
            f"rope_type {kind!r} is not supported, because vLLM and transformers compute other positions; "
            f"supported are {', '.join(SAME)}"
        )
    if (share := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {share}; only 1.0 is supported, because vLLM rotates all channels of a head"
        )
    if kind == "yarn" and not math.isclose(learned := transformers_temperature(rope), vllm_temperature(rope)):
        raise ValueError(
            f"YaRN's attention temperature is {learned:g} in transformers, but {vllm_temperature(rope):g} in vLLM; "
            f"set rope_parameters.attn_factor to {learned:g} and apply_yarn_scaling to false"
        )


def transformers_temperature(rope: Mapping[str, Any]) -> float:
    """Returns the factor by which YaRN scales cosines and sines in transformers."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    factor, mscale, of_all = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and of_all:
        return _scale(factor, mscale) / _scale(factor, of_all)
    return _scale(factor)


def vllm_temperature(rope: Mapping[str, Any]) -> float:
    """Returns the factor by which YaRN scales cosines and sines in vLLM."""
    own = float(rope.get("attn_factor", 1.0))
    return own * _scale(float(rope["factor"])) if rope.get("apply_yarn_scaling", True) else own


def _scale(factor: float, mscale: float = 1.0) -> float:
    """The temperature of YaRN (arXiv 2309.00071), 0.1 ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
