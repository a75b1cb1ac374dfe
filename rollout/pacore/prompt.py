"""PaCoRe's prompts: a problem together with messages, the final answers of earlier attempts at it.

The serialisation is that of the PaCoRe paper (arXiv 2601.05593): an instruction, the problem, the numbered messages, a
closing request. The default wording is ours; what a policy was trained with goes along in its folder.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError, meta

from rl.types import SYNTHESIS_TEMPLATE, PooledAnswers, Prompt

TEMPLATE = Path(__file__).with_name("pacore.jinja")
VARIABLES = {"problem", "messages"}
_PICTURE = "\ue000"  # stands for a picture while the template is filled; of a private area, so no text has it


def synthesis_template(model: str | Path, template: Path | None) -> Path | None:
    """The template that counts: the one that is named, else the one that the model's folder carries, if any."""
    carried = Path(model) / SYNTHESIS_TEMPLATE
    return template or (carried if carried.is_file() else None)


class SynthesisPrompt:
    """Prompts that show messages.

    Args:
        template: Jinja file that uses `problem` and `messages`; None is the default.
    Raises: ValueError if it cannot be read or uses other variables.
    """

    def __init__(self, template: Path | None = None) -> None:
        path = template or TEMPLATE
        environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            source = path.read_text(encoding="utf-8")
            used = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (OSError, TemplateError) as error:
            raise ValueError(f"the template {path} cannot be used: {error}") from error
        if used != VARIABLES:
            raise ValueError(f"the template {path} has to use problem and messages; it uses {', '.join(sorted(used))}")

    def turns(self, prompt: Prompt) -> tuple[Mapping[str, Any], ...]:
        """The chat that the policy sees: that of the prompt, its last turn replaced by problem and messages if it shows
        any.

        Pictures stay where they were in the problem. Raises ValueError if the template fails.
        """
        if prompt.shown is None:
            return prompt.messages
        try:
            return tuple(self.with_messages(prompt.messages, prompt.shown.texts))
        except TemplateError as error:
            raise ValueError(f"row {prompt.id}: the template fails: {error}") from error

    def with_messages(self, turns: Sequence[Mapping[str, Any]], messages: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """A chat in OpenAI's form, its last turn replaced by problem and messages; itself if there are none.

        Raises: jinja2.TemplateError if the template fails.
        """
        if not messages:
            return turns
        *before, last = turns
        text, kept = _with_marks(last["content"])
        filled = self._template.render(problem=text, messages=[one.replace(_PICTURE, "") for one in messages]).strip()
        return (*before, {**last, "content": _without_marks(filled, kept)})


def showing(prompt: Prompt, least: int, most: int, seed: str) -> Prompt:
    """The prompt with |M| ~ U(least, most) messages of its pool, without replacement and in random order (PaCoRe paper,
    training; the report's numbers are 16 and 24).

    A pool of fewer than `most` limits the draw. Raises ValueError if it has fewer than `least`.
    """
    pool = prompt.messages_pool
    if len(pool) < least:
        raise ValueError(f"row {prompt.id}: a pool of {len(pool)} messages has not the {least} that are to be drawn")
    draw = random.Random(seed)
    chosen = draw.sample(range(len(pool)), draw.randint(least, min(most, len(pool))))
    accepted = tuple(prompt.pool_accepted[n] for n in chosen) if prompt.pool_accepted else None
    return replace(prompt, shown=PooledAnswers(tuple(pool[n] for n in chosen), accepted))


def _with_marks(content: str | Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """The text with a mark for every part that is none, and those parts."""
    if isinstance(content, str):
        return content.replace(_PICTURE, ""), []
    kept = [part for part in content if part["type"] != "text"]
    texts = (part["text"].replace(_PICTURE, "") if part["type"] == "text" else _PICTURE for part in content)
    return "".join(texts), kept


def _without_marks(text: str, kept: Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """The parts back where their marks are. A template that repeats the problem shows its pictures as often."""
    first, *others = text.split(_PICTURE)
    if not others:
        return text
    parts: list[Mapping[str, Any]] = [{"type": "text", "text": first}]
    for number, other in enumerate(others):
        parts += [kept[number % len(kept)], {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]
