"""A prompt's messages to token ids through the model's own chat template, and sampled ids back to text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer

from rl.model.config import StepVLConfig
from rl.model.hf_folder import read_config
from rl.model.layout import picture_tokens
from rl.types import THINK_CLOSE, THINK_OPEN, Prompt
from rollout.pacore.prompt import SynthesisPrompt

IMAGE_TOKEN = "<im_patch>"


class Chat:
    """The tokenizer of a model folder.

    Args:
        folder: a local Hugging Face folder.
        template: Jinja file that replaces the folder's chat template.
        synthesis: how messages are shown together with their problem; None is the default wording.
    Raises: ValueError if there is no chat template, or no image token where the model needs one.
    """

    def __init__(
        self, folder: str | Path, template: Path | None = None, synthesis: SynthesisPrompt | None = None
    ) -> None:
        self.synthesis = synthesis or SynthesisPrompt()
        self.config = read_config(folder)
        self.tokenizer = cast(Any, AutoTokenizer.from_pretrained(folder))
        if template is not None:
            self.tokenizer.chat_template = template.read_text()
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template; name a Jinja file in model.chat_template of the recipe")
        self.sees = isinstance(self.config, StepVLConfig)
        if self.sees and self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != self.config.image_token_id:
            raise ValueError(
                f"{folder}: the tokenizer does not give {IMAGE_TOKEN} the config's image_token_id "
                f"{self.config.image_token_id}"
            )

        self._control = frozenset(self.tokenizer.all_special_ids)
        self._think = frozenset(self.tokenizer.convert_tokens_to_ids([THINK_OPEN, THINK_CLOSE]))

    @property
    def reserved(self) -> tuple[str, ...]:
        """Control tokens that must not stand in a data row's text."""
        return tuple(self.tokenizer.all_special_tokens)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids up to where the response starts, with one image token per picture, and with the messages that the
        prompt shows.

        Raises: ValueError naming the row if the model cannot see pictures or the template loses one.
        """
        if prompt.images and not self.sees:
            raise ValueError(f"row {prompt.id} shows pictures, but {self.config.model_type} is a text model")
        try:
            ids = self.tokenizer.apply_chat_template(
                [_plain(m) for m in self.synthesis.chat(prompt)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise ValueError(f"row {prompt.id}: the chat template refuses its messages: {error}") from error
        shown = ids.count(self.config.image_token_id) if self.sees else 0
        if shown != len(prompt.images):
            raise ValueError(
                f"row {prompt.id} has {len(prompt.images)} pictures, but its prompt has {shown} image tokens; "
                "check the chat template"
            )
        return tuple(ids)

    def length(self, prompt: Prompt) -> int:
        """Tokens of the prompt with every picture at its full number of tokens."""
        return len(self.prompt_ids(prompt)) + sum(self.picture_tokens(p.size) - 1 for p in prompt.images)

    def picture_tokens(self, size: tuple[int, int]) -> int:
        """Prompt tokens that a picture of `size` (width, height) takes."""
        c = self.config
        return picture_tokens(size, c.global_size, c.crop_size, c.image_token_len, c.patch_token_len)

    def text(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """Sampled ids as text: control tokens removed, think tags kept.

        Some templates open the thinking themselves; then the text says so too, so that a response cut while
        thinking has no answer.
        """
        visible = [i for i in response_ids if i in self._think or i not in self._control]
        opened = self.tokenizer.decode(prompt_ids[-4:]).rstrip().endswith(THINK_OPEN)
        return (THINK_OPEN if opened else "") + self.tokenizer.decode(visible)


def _plain(message: Any) -> dict[str, Any]:
    """Image parts become the image token, so that every chat template understands them."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(IMAGE_TOKEN if p["type"] == "image" else p["text"] for p in content)
    return {**message, "content": content}
