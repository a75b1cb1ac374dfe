"""Tests the conversion of prompts to token ids and of sampled ids to text, with a model folder's chat template."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.scale import tokenizer
from rewards import get
from rl.model.config import StepVLConfig
from rl.types import Picture, Prompt, Rollout
from rollout.chat import Chat
from tests.support.tiny import picture

PICTURE = picture((60, 60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the scale model's tokenizer and a config in which a picture without crops has 16 image tokens."""
    made = tokenizer.save(tmp_path)
    config = StepVLConfig(
        vision_config={"image_size": 224, "width": 16, "layers": 1, "heads": 2},
        text_config={"vocab_size": made.get_vocab_size(), "hidden_size": 16},
        image_token_id=made.token_to_id("<im_patch>"),
        image_token_len=16,
        patch_token_len=9,
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def asking(text: str, *images: Picture) -> Prompt:
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Prompt("row-7", "t", ({"role": "user", "content": parts},), images)


def test_a_prompt_has_one_image_token_per_picture_and_ends_where_the_response_begins(folder: Path) -> None:
    chat = Chat(folder)
    ids = chat.prompt_ids(asking("Point at the red circle.", PICTURE, PICTURE))
    assert ids.count(chat.config.image_token_id) == 2
    assert chat.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_the_length_counts_every_picture_in_full(folder: Path) -> None:
    chat = Chat(folder)
    alone = chat.length(asking("Hello"))
    assert chat.length(asking("Hello", PICTURE)) == alone + 16 + 2  # 2 for the picture's start token and end token


def test_text_keeps_the_think_tags_and_drops_control_tokens(folder: Path) -> None:
    chat = Chat(folder)
    ids = chat.tokenizer("<think>maybe</think>[0.25, 0.50]<|im_end|>", add_special_tokens=False).input_ids
    assert chat.text((), ids) == "<think>maybe</think>[0.25, 0.50]"


def test_the_text_begins_with_the_think_tag_if_the_template_ends_with_it(folder: Path) -> None:
    template = folder / "thinking.jinja"
    template.write_text("{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}")
    chat = Chat(folder, template)
    prompt = chat.prompt_ids(asking("Hello"))
    cut_short = chat.tokenizer("maybe", add_special_tokens=False).input_ids
    assert chat.text(prompt, cut_short) == "<think>maybe"


def test_the_text_begins_with_both_think_tags_if_the_template_ends_with_an_empty_thought(folder: Path) -> None:
    template = folder / "not_thinking.jinja"
    template.write_text("{{ messages[0].content }}{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}")
    chat = Chat(folder, template)
    text = chat.text(chat.prompt_ids(asking("Hello")), chat.tokenizer("42", add_special_tokens=False).input_ids)
    assert text == "<think></think>42"
    assert get("format_tags")(Rollout(asking("Hello"), text)).value == 1.0


def test_the_error_for_a_folder_without_a_template_names_the_option(folder: Path) -> None:
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        file = folder / name
        if file.exists():
            file.write_text("{}" if name.endswith("json") else "")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"has no chat template; set model.chat_template of the recipe"):
        Chat(folder)


def test_a_template_that_drops_a_picture_is_refused(folder: Path) -> None:
    template = folder / "blind.jinja"
    template.write_text("{{ messages[0].role }}")
    with pytest.raises(ValueError, match="row row-7 has 1 pictures, but its prompt has 0 image tokens"):
        Chat(folder, template).prompt_ids(asking("Hello", PICTURE))


def test_a_tokenizer_without_the_models_image_token_is_refused(folder: Path) -> None:
    config = StepVLConfig.from_pretrained(folder)
    config.image_token_id = 3
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer's id of <im_patch> is not the config's image_token_id 3"):
        Chat(folder)


def test_a_prompt_is_rendered_once_for_all_its_responses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, rendered = Chat(folder), list[str]()
    render = chat.synthesis.chat

    def counted(prompt: Prompt) -> Any:
        rendered.append(prompt.id)
        return render(prompt)

    monkeypatch.setattr(chat.synthesis, "chat", counted)
    one, other = asking("Hello", PICTURE), asking("Point at it.", PICTURE)
    ids = [(chat.prompt_ids(one), chat.length(one)) for _ in range(16)]
    assert len(set(ids)) == 1 and len(rendered) == 1
    assert chat.prompt_ids(other) != ids[0][0] and len(rendered) == 2
    same = replace(one)  # an equal prompt, but another object
    assert (chat.prompt_ids(same), chat.length(same)) == ids[0] == (Chat(folder).prompt_ids(one), chat.length(one))


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"{folder} has no tokenizer that can be loaded"):
        Chat(folder)
