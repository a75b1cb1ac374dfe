"""PaCoRe's prompts: a problem together with messages, the final answers of earlier attempts at it.

The serialisation is that of the PaCoRe paper (arXiv 2601.05593): an instruction, the problem, the numbered messages, a
closing request. The wording is ours; a checkpoint that was trained with another one brings its own template.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError, meta

from rl.types import Prompt

TEMPLATE = Path(__file__).parent / "prompts" / "pacore.jinja"
VARIABLES = {"problem", "messages"}
_PICTURE = "\ue000"  # stands for a picture while the template is filled; of a private area, so no text has it


class Synthesis:
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

    def prompt(self, row: Prompt, messages: Sequence[str]) -> Prompt:
        """The row with its last turn replaced by problem and messages; the row itself if there are none.

        Pictures stay where they were in the problem. Raises ValueError if the template fails.
        """
        if not messages:
            return row
        *before, last = row.messages
        try:
            text = self._template.render(
                problem=_with_marks(last["content"]), messages=[one.replace(_PICTURE, "") for one in messages]
            ).strip()
        except TemplateError as error:
            raise ValueError(f"row {row.id}: the template fails: {error}") from error
        return replace(row, messages=(*before, {"role": last["role"], "content": _without_marks(text)}))


def drawn(pool: Sequence[str], least: int, most: int, seed: str) -> list[str]:
    """|M| ~ U(least, most) messages of a pool, without replacement and in random order (PaCoRe paper, training).

    A pool of fewer than `most` limits the draw. Raises ValueError if it has fewer than `least`.
    """
    if len(pool) < least:
        raise ValueError(f"a pool of {len(pool)} messages has not the {least} that are to be drawn")
    draw = random.Random(seed)
    count = draw.randint(least, min(most, len(pool)))
    return draw.sample(list(pool), count)


def _with_marks(content: str | Sequence[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(_PICTURE if part["type"] == "image" else part["text"] for part in content)


def _without_marks(text: str) -> str | list[dict[str, str]]:
    first, *others = text.split(_PICTURE)
    if not others:
        return text
    parts: list[dict[str, str]] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]
