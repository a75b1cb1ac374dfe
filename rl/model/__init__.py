"""Architectures behind one small protocol: what the learner knows of a vision-language model.

    pictures -> features; `model` (the decoder trunk) and `lm_head`; which tensors `encoder` and `projector`
    name. Attribute names are tensor names on disk. rl/model/packed.py runs the trunk on packed rows.

StepVL is the first implementation, text-only Hugging Face decoders the second.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn


class Architecture(Protocol):
    """See the module docstring; implementations are torch modules."""

    config: Any
    frozen_prefixes: dict[str, tuple[str, ...]]  # freeze name -> prefixes of tensor names
    model: Any  # decoder trunk: inputs_embeds [1, T, hidden], position_ids [1, T] -> last_hidden_state
    lm_head: nn.Linear

    @property
    def image_token_id(self) -> int | None: ...

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]: ...
