"""Converts prompts to token ids, with the model's chat template, and converts sampled token ids to text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from rl.model.hf_folder import read_config
from rl.model.registry import family
from rl.types import THINK_CLOSE, THINK_OPEN, Prompt
from rollout.pacore.prompt import SynthesisPrompt

_BEGUN = re.compile(rf"{THINK_OPEN}\s*({THINK_CLOSE}\s*)?$")


class Chat:
    """The tokenizer and the chat template of a model folder.

    Args:
        folder: a local Hugging Face folder.
        template: Jinja file that replaces the folder's chat template.
        synthesis: the template for prompts that contain answers of earlier attempts. None means the default template.
    Raises: ValueError if there is no tokenizer or no chat template, or if the tokenizer and the config give different
        ids to the image token.
    """

    def __init__(
        self, folder: str | Path, template: Path | None = None, synthesis: SynthesisPrompt | None = None
    ) -> None:
        self.synthesis = synthesis or SynthesisPrompt()
        self.config = read_config(folder)
        self.tokenizer = _tokenizer(folder)
        if template is not None:
            self.tokenizer.chat_template = template.read_text()
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template; set model.chat_template of the recipe to a Jinja file")
        self.image = family(self.config).image_token(self.config)
        if self.image and self.tokenizer.convert_tokens_to_ids(self.image.token) != self.image.id:
            raise ValueError(
                f"{folder}: the tokenizer's id of {self.image.token} is not the config's image_token_id {self.image.id}"
            )

        self.never_sampled = frozenset(family(self.config).never_sampled(self.config))
        self._control = frozenset(self.tokenizer.all_special_ids)
        self._think = frozenset(self.tokenizer.convert_tokens_to_ids([THINK_OPEN, THINK_CLOSE]))
        self._last: tuple[Prompt, tuple[int, ...]] | None = None  # the last tokenized prompt, and its ids

    @property
    def reserved(self) -> tuple[str, ...]:
        """The control tokens. The text of a data row must not contain them."""
        return tuple(self.tokenizer.all_special_tokens)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Returns the token ids of the whole prompt, with one image token per picture. If the prompt contains the
        answers of earlier attempts, the tokens of these answers are included.

        The last result is cached, because this method is called with the same Prompt object for every response of a
        group.
        Raises: ValueError in three cases: the row has pictures but the model is a text model, the template leaves out a
            picture, or the template fails. The error message contains the row's id.
        """
        last = self._last  # other threads may change self._last, so it is read a single time
        if last is None or last[0] is not prompt:
            self._last = last = (prompt, self._tokenize(prompt))
        return last[1]

    def _tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.images and not self.image:
            raise ValueError(f"row {prompt.id} has pictures, but {self.config.model_type} is a text model")
        try:
            ids = self.tokenizer.apply_chat_template(
                [self._plain(m) for m in self.synthesis.chat(prompt)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise ValueError(f"row {prompt.id}: the chat template fails on the row's messages: {error}") from error
        image_tokens = ids.count(self.image.id) if self.image else 0
        if image_tokens != len(prompt.images):
            raise ValueError(
                f"row {prompt.id} has {len(prompt.images)} pictures, but its prompt has {image_tokens} image tokens; "
                "check the chat template"
            )
        return tuple(ids)

    def length(self, prompt: Prompt) -> int:
        """Returns the number of tokens of the prompt, including all tokens of each picture."""
        return len(self.prompt_ids(prompt)) + sum(self.picture_tokens(p.size) - 1 for p in prompt.images)

    def picture_tokens(self, size: tuple[int, int]) -> int:
        """Returns the number of tokens that a picture takes in a prompt. `size` is (width, height) in pixels."""
        return self.image.expansion(size) if self.image else 0

    def text(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """Returns the text of the sampled ids. Control tokens are removed, think tags are kept.

        Some chat templates end the prompt with the opening think tag, and some with an empty thought, if the model is
        told not to think. In these cases, the tags are put before the text. Without the tags, unfinished thinking would
        look like a final answer, and the tags of the response would look incomplete to rewards.
        """
        visible = [i for i in response_ids if i in self._think or i not in self._control]
        begun = _BEGUN.search(self.tokenizer.decode(prompt_ids[-32:]))
        tags = (THINK_OPEN + (THINK_CLOSE if begun[1] else "")) if begun else ""
        return tags + self.tokenizer.decode(visible)

    def _plain(self, message: Any) -> dict[str, Any]:
        """Replaces the image parts of a message with the image token, because some chat templates accept only text."""
        content = message["content"]
        if not isinstance(content, str):
            image = self.image.text if self.image else ""
            content = "".join(image if p["type"] == "image" else p["text"] for p in content)
        return {**message, "content": content}


def _tokenizer(folder: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many classes, most of them without the folder's name
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} has no tokenizer that can be loaded, such as tokenizer.json: {reason}") from error
