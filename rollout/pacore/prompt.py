"""Makes the prompts for PaCoRe's synthesis. A prompt contains a problem and messages: the final answers of earlier
attempts.

The prompts have the parts described in the PaCoRe paper (arXiv 2601.05593): an instruction, the problem, the numbered
messages, and a closing request. The default wording is ours. If a policy was trained with another template, its model
folder contains that template. Templates run in a sandbox (rl/templates.py).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta

from rl.templates import template_environment
from rl.types import SYNTHESIS_TEMPLATE, PooledAnswers, Prompt

TEMPLATE = Path(__file__).with_name("pacore.jinja")
VARIABLES = {"problem", "messages"}
_PICTURE = "\ue000"  # a private-use character that marks a picture while the template is rendered

Chat = Sequence[Mapping[str, Any]]  # {role, content} of each message, in the format of OpenAI's API


def synthesis_template(model: str | Path, template: Path | None) -> Path | None:
    """Returns `template` if it is given, else the template in the model's folder, else None."""
    carried = Path(model) / SYNTHESIS_TEMPLATE
    return template or (carried if carried.is_file() else None)


class SynthesisPrompt:
    """Renders prompts that contain the messages of earlier attempts.

    Args:
        template: Jinja file that uses the variables `problem` and `messages`. None means the default template.
    Raises: ValueError if the template cannot be read or uses other variables.
    """

    def __init__(self, template: Path | None = None) -> None:
        path = template or TEMPLATE
        environment = template_environment()
        try:
            source = path.read_text(encoding="utf-8")
            used = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (OSError, TemplateError) as error:
            raise ValueError(f"the template {path} cannot be used: {error}") from error
        if used != VARIABLES:
            raise ValueError(
                f"the template {path} must use the variables problem and messages, but uses {', '.join(sorted(used))}"
            )

    def chat(self, prompt: Prompt) -> tuple[Mapping[str, Any], ...]:
        """Returns the chat that the policy sees. If `prompt.shown` is given, the template adds the answers in
        `prompt.shown` to the chat. Otherwise the chat of the prompt is returned unchanged.

        Raises: ValueError if the template fails.
        """
        if prompt.shown is None:
            return prompt.messages
        try:
            return tuple(self.with_messages(prompt.messages, prompt.shown.texts))
        except TemplateError as error:
            raise ValueError(f"row {prompt.id}: the template fails: {error}") from error

    def with_messages(self, chat: Chat, messages: Sequence[str]) -> Chat:
        """Renders the last entry of a chat with the template. The text of this entry is the problem, to which the
        template adds the messages. The pictures keep their places in the problem. Without messages, the chat is
        returned unchanged.

        Raises: jinja2.TemplateError if the template fails.
        """
        if not messages:
            return chat
        *before, last = chat
        text, other_parts = _with_marks(last["content"])
        messages = [message.replace(_PICTURE, "") for message in messages]
        rendered = self._template.render(problem=text, messages=messages).strip()
        return (*before, {**last, "content": _without_marks(rendered, other_parts)})


def draw_messages(prompt: Prompt, least: int, most: int, seed: str) -> Prompt:
    """Returns the prompt with messages drawn from its `messages_pool`, without replacement and in random order. The
    number of messages is drawn uniformly from the range `least` to `most`.

    This is the training procedure of the PaCoRe paper. In the STEP3-VL-10B report, the number is from 16 to 24. If the
    pool has fewer than `most` messages, the size of the pool is used in place of `most`. Raises ValueError if the pool
    has fewer than `least` messages.
    """
    pool = prompt.messages_pool
    if len(pool) < least:
        raise ValueError(f"row {prompt.id}: its pool has {len(pool)} messages, but at least {least} are needed")
    draw = random.Random(seed)
    chosen = draw.sample(range(len(pool)), draw.randint(least, min(most, len(pool))))
    accepted = tuple(prompt.pool_accepted[n] for n in chosen) if prompt.pool_accepted else None
    return replace(prompt, shown=PooledAnswers(tuple(pool[n] for n in chosen), accepted))


def _with_marks(content: str | Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """Joins the parts of a message's content into one text, in which a mark replaces each part that is not text.
    Returns this text, and the replaced parts."""
    if isinstance(content, str):
        return content.replace(_PICTURE, ""), []
    other_parts = [part for part in content if part["type"] != "text"]
    texts = (part["text"].replace(_PICTURE, "") if part["type"] == "text" else _PICTURE for part in content)
    return "".join(texts), other_parts


def _without_marks(text: str, other_parts: Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """Replaces the marks in a text with `other_parts`, in order. If a template repeats the problem, the pictures of the
    problem are repeated too."""
    first, *others = text.split(_PICTURE)
    if not others:
        return text
    parts: list[Mapping[str, Any]] = [{"type": "text", "text": first}]
    for number, other in enumerate(others):
        parts += [other_parts[number % len(other_parts)], {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]
