"""Reward `format_tags`: 1.0 if the whole response, including its thinking, has the required tags, else 0.0."""

from typing import Annotated

from pydantic import Field

from rewards import Rollout, Score, reward

Tag = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]{0,40}$")]


@reward("format_tags", on_timeout="lowest")
def format_tags(
    rollout: Rollout, tags: Annotated[tuple[Tag, ...], Field(min_length=1)] = ("think",), answer_tag: Tag | None = None
) -> Score:
    """1.0 if each of `tags` is opened and closed once, in this order, and an answer follows; else 0.0.

    Only white space may stand before and between the tagged parts. The answer follows the tagged parts, and must not be
    empty. If `answer_tag` is given, the answer must be inside this tag, and nothing may follow the tag. The parts in
    `tags` may be empty, because a model that is told not to think leaves `<think></think>` empty.

    The STEP3-VL report mentions no format reward. This reward works like the usual format rewards.
    """
    why = _breach(rollout.text, tags, answer_tag)
    return Score(0.0, {"why": why}) if why else Score(1.0)


def _breach(text: str, tags: tuple[str, ...], answer_tag: str | None) -> str:
    """Returns a description of the first error in the tags, or "" if there is no error."""
    end, content = 0, ""
    for tag in (*tags, *([answer_tag] if answer_tag else [])):
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return f"{opening} and {closing} do not occur exactly once each"
        start = text.index(opening)
        if start < end or text[end:start].strip():
            return f"{opening} is not at the beginning or directly after the previous tag"
        end = text.index(closing) + len(closing)
        if end <= start:
            return f"{closing} comes before {opening}"
        content = text[start + len(opening) : end - len(closing)]
    rest = text[end:].strip()
    if answer_tag and rest:
        return f"text after </{answer_tag}>"
    return "" if (content if answer_tag else rest).strip() else "no answer"
