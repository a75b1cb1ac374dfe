"""The base class of model families: what the learner needs to know of a vision-language model.

Attribute names are tensor names on disk. rl/model/packed.py runs the decoder trunk on packed rows. StepVL is one
family (rl/model/step_vl.py), text-only Hugging Face decoders are the other (rl/model/text.py).

Tested in tests/rl/model/test_step_vl.py and tests/rl/model/test_text.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from rl.model.layout import Size


@dataclass(frozen=True)
class ImageToken:
    """The token that stands for each picture in the prompts of a model."""

    text: str  # as the tokenizer spells it
    id: int
    expansion: Callable[[Size], int]  # (width, height) of a picture in pixels -> prompt tokens that the picture takes


class Architecture(nn.Module):
    """A model of one family, made from its config."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]]  # name in model.freeze -> prefixes of tensor names
    config: Any
    model: Any  # decoder trunk: inputs_embeds [1, T, hidden], position_ids [1, T] -> last_hidden_state
    lm_head: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def image_token(cls, config: Any) -> ImageToken | None:
        """Returns the image token of models with this config; None if they see no pictures."""
        raise NotImplementedError

    @property
    def image_token_id(self) -> int | None:
        """The id of the image token; None if the model sees no pictures."""
        token = self.image_token(self.config)
        return token.id if token else None

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Returns the frozen encoder's features of each picture, [image tokens, hidden]."""
        raise NotImplementedError
