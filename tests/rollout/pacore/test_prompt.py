"""Tests synthesis prompts: how messages are drawn, where pictures are placed, and which template is used."""

from dataclasses import replace
from pathlib import Path

import pytest

from rl.types import Picture, PooledAnswers, Prompt
from rollout.pacore.prompt import SynthesisPrompt, draw_messages, synthesis_template
from tests.support.data_rows import png

PROMPT = Prompt("a", "t", ({"role": "user", "content": "What is 2 + 2?"},))


def test_draws_have_all_sizes_and_no_duplicates_and_depend_only_on_the_seed() -> None:
    pool = [f"m{n}" for n in range(24)]
    accepted = tuple(n % 2 == 0 for n in range(24))

    def drawn(size: int, seed: str) -> PooledAnswers:
        prompt = replace(PROMPT, messages_pool=tuple(pool[:size]), pool_accepted=accepted[:size])
        shown = draw_messages(prompt, 16, 24, seed).shown
        assert shown is not None and shown.accepted == tuple(accepted[pool.index(text)] for text in shown.texts)
        return shown

    draws = [drawn(24, f"seed {n}").texts for n in range(200)]
    assert {len(draw) for draw in draws} == set(range(16, 25))
    assert all(len(set(draw)) == len(draw) for draw in draws)
    assert any(list(draw) != sorted(draw, key=pool.index) for draw in draws)
    assert drawn(24, "seed 3").texts == draws[3]
    assert {len(drawn(16, f"{n}").texts) for n in range(20)} == {16}
    with pytest.raises(ValueError, match="row a: its pool has 15 messages, but at least 16 are needed"):
        drawn(15, "")


def test_without_messages_the_prompt_is_the_plain_problem() -> None:
    prompt = PROMPT
    assert SynthesisPrompt().chat(prompt) is prompt.messages
    assert SynthesisPrompt().chat(replace(prompt, shown=PooledAnswers(()))) is prompt.messages


def test_pictures_keep_their_places_in_the_problem(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ problem }}|{% for m in messages %}{{ m }}|{% endfor %}")
    content = ({"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "!"})
    prompt = Prompt("a", "t", ({"role": "user", "content": content},), images=(Picture.of(png()),))
    prompt = replace(prompt, shown=PooledAnswers(("x\ue000", "y")))
    assert SynthesisPrompt(template).chat(prompt)[0]["content"] == [
        {"type": "text", "text": "See "},
        {"type": "image"},
        {"type": "text", "text": "!|x|y|"},
    ]


@pytest.mark.parametrize("text", ["{{ problem }}", "{{ problem }}{{ messages }}{{ title }}", "{{ problem"])
def test_an_invalid_template_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ValueError, match=r"t\.jinja"):
        SynthesisPrompt(tmp_path / "t.jinja")


def test_a_template_that_runs_code_fails_and_its_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "pacore.jinja").write_text("{{ problem.__class__.__mro__ }}{{ messages }}")
    asks = SynthesisPrompt(synthesis_template(tmp_path, None))
    asked = Prompt("row 7", "t", ({"role": "user", "content": "2 + 3?"},), shown=PooledAnswers(("5",)))
    with pytest.raises(ValueError, match="row row 7: the template fails: access to attribute '__class__'"):
        asks.chat(asked)


def test_the_template_in_the_models_folder_is_used_unless_another_is_given(tmp_path: Path) -> None:
    named = tmp_path / "named.jinja"
    assert (synthesis_template(tmp_path, None), synthesis_template(tmp_path, named)) == (None, named)
    carried = tmp_path / "pacore.jinja"
    carried.write_text("{{ problem }}{{ messages }}")
    assert (synthesis_template(tmp_path, None), synthesis_template(tmp_path, named)) == (carried, named)
