"""Defines Architecture, the base class of all model families. The class declares all methods and attributes that the
learner needs from a vision-language model.

The attributes of a model have the same names as its tensors on disk. rl/model/packed.py runs the decoder trunk (the
decoder without its head) on packed rows. There are two kinds of families: StepVL (rl/model/step_vl.py) and text-only
Hugging Face decoders (rl/model/text.py).

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
    """The token that stands for a picture in the prompts of a model."""

    text: str  # the token's text in the tokenizer
    id: int
    expansion: Callable[[Size], int]  # (width, height) of a picture in pixels -> number of prompt tokens of the picture
    words: Callable[[Size], list[str]]  # (width, height) -> the words of the tokenizer that stand for the picture
    shown: Callable[[Size], Size]  # (width, height) of a picture -> size after the model's own padding and scaling


class Architecture(nn.Module):
    """A model of one family, built from a config."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]]  # name in model.freeze -> prefixes of the frozen tensors
    config: Any
    model: Any  # decoder trunk: inputs_embeds [1, T, hidden], position_ids [1, T] -> last_hidden_state
    lm_head: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def image_token(cls, config: Any) -> ImageToken | None:
        """Returns the image token of models with this config, or None if these models accept no pictures."""
        raise NotImplementedError

    @property
    def image_token_id(self) -> int | None:
        """The id of the image token, or None if the model accepts no pictures."""
        token = self.image_token(self.config)
        return token.id if token else None

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Returns one tensor per picture: the frozen encoder's features, [image tokens, hidden]."""
        raise NotImplementedError
