"""Defines Architecture, the base class of all model families. The class declares all methods and attributes that the
learner needs from a vision-language model.

The attributes of a model have the published names of its tensors (see `disk_name` for exceptions). rl/model/packed.py
runs the decoder trunk (the decoder without its head) on packed rows. The families are in rl/model/step_vl.py,
rl/model/qwen_vl.py and rl/model/text.py.

Tested in tests/rl/model/test_step_vl.py and tests/rl/model/test_text.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from rl.model.layout import Size


@dataclass(frozen=True)
class ImageToken:
    """The token that stands for a picture in the prompts of a model."""

    text: str  # the text that stands for a picture in a chat; its tokens include the image token once
    token: str  # the token's text in the tokenizer
    id: int
    expansion: Callable[[Size], int]  # (width, height) of a picture in pixels -> number of prompt tokens of the picture
    words: Callable[[Size], list[str]]  # (width, height) -> the words of the tokenizer that stand for the picture
    shown: Callable[[Size], Size]  # (width, height) of a picture -> size after the model's own padding and scaling


class Architecture(nn.Module):
    """A model of one family, built from a config."""

    frozen_prefixes: ClassVar[dict[str, tuple[str, ...]]]  # name in model.freeze -> prefixes of the frozen tensors
    disk_prefixes: ClassVar[tuple[tuple[str, str], ...]] = ()  # (prefix here, prefix on disk), if they differ
    config: Any
    model: Any  # decoder trunk: inputs_embeds [1, T, hidden], position_ids [1, T] or [3, 1, T] -> last_hidden_state
    lm_head: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def complete(cls, config: Any, folder: Path) -> None:
        """Adds to a config what the family needs from other files of the folder. Raises CheckpointError if such a file
        is missing."""

    @classmethod
    def image_token(cls, config: Any) -> ImageToken | None:
        """Returns the image token of models with this config, or None if these models accept no pictures."""
        raise NotImplementedError

    @classmethod
    def never_sampled(cls, config: Any) -> tuple[int, ...]:
        """Returns the ids that engine and learner leave out of the softmax, because a response must not have them."""
        return ()

    @classmethod
    def positions(cls, config: Any, prompt_ids: Sequence[int], sizes: Sequence[Size]) -> tuple[Tensor, int]:
        """Returns the positions of a prompt's tokens, [1 or 3, P] int64, and the position of the first response token.

        Args:
            prompt_ids: [P], with all tokens of each picture.
            sizes: (width, height) in pixels of each picture.
        """
        return torch.arange(len(prompt_ids))[None], len(prompt_ids)

    @classmethod
    def disk_name(cls, name: str) -> str:
        """Returns the name on disk of the tensor `name` of this class."""
        for here, on_disk in cls.disk_prefixes:
            if name.startswith(here):
                return on_disk + name.removeprefix(here)
        return name

    def materialize(self, device: str) -> None:
        """Computes the tables of rotary positions. They are not stored on disk, and they are empty in a model that was
        built on the device "meta"."""
        trunk = self.model
        trunk.rotary_emb = type(trunk.rotary_emb)(config=trunk.config, device=device)

    @property
    def image_token_id(self) -> int | None:
        """The id of the image token, or None if the model accepts no pictures."""
        token = self.image_token(self.config)
        return token.id if token else None

    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Returns one tensor per picture: the frozen encoder's features, [image tokens, hidden]."""
        raise NotImplementedError
