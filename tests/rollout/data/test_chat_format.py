"""Tests the different notations of messages and pictures in data rows."""

import base64
from pathlib import Path

import pytest

from tests.support.data_rows import jsonl, only_prompt, parquet, png, read_rows, reasons, row, text, user


def test_content_without_a_picture_becomes_one_text(tmp_path: Path) -> None:
    prompt = read_rows(jsonl(tmp_path, row(messages=user(text("1 + "), text("1?")))))[0]
    assert prompt.messages[0]["content"] == "1 + 1?"


def test_picture_parts_become_placeholders_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((3, 2)))
    (tmp_path / "two.png").write_bytes(png((5, 4)))
    two, one = ({"type": "image", "image": f"{name}.png"} for name in ("two", "one"))
    prompt = read_rows(jsonl(tmp_path, row(messages=user(two, text("or"), one))))[0]
    assert prompt.messages[0]["content"] == [{"type": "image"}, text("or"), {"type": "image"}]
    assert [picture.size for picture in prompt.images] == [(5, 4), (3, 2)]


def test_pictures_of_the_column_images_replace_marks_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((3, 2)))
    (tmp_path / "two.png").write_bytes(png((5, 4)))
    chat = [{"role": "user", "content": "<image>left, <image>"}]
    prompt = read_rows(jsonl(tmp_path, row(messages=chat, images=["one.png", "two.png"])))[0]
    assert prompt.messages[0]["content"] == [{"type": "image"}, text("left, "), {"type": "image"}]
    assert [picture.size for picture in prompt.images] == [(3, 2), (5, 4)]


def test_image_parts_without_a_picture_get_pictures_of_the_column_images(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    chat = user({"type": "image"}, text("what?"))
    assert len(read_rows(jsonl(tmp_path, row(messages=chat, images=["one.png"])))[0].images) == 1


def test_a_plain_question_shows_its_pictures_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    prompt = only_prompt(jsonl(tmp_path, row(messages="What is it?", images="a.png")))
    assert prompt.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert prompt.images[0].size == (3, 2)


def test_parquet_rows_hold_pictures_as_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((3, 2)))
    chat = [{"role": "user", "content": "<image><image>"}]
    images = [{"bytes": png((5, 4)), "path": None}, {"bytes": None, "path": "one.png"}]
    prompt = read_rows(parquet(tmp_path, row(messages=chat, images=images, ground_truth="x")))[0]
    assert [picture.size for picture in prompt.images] == [(5, 4), (3, 2)]
    assert prompt.images[0].source == png((5, 4))


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", ""])
def test_pictures_may_be_base64(tmp_path: Path, prefix: str) -> None:
    encoded = prefix + base64.b64encode(png()).decode()
    for messages, images in ((user({"type": "image", "image": encoded}), []), ("<image>?", [encoded])):
        assert only_prompt(jsonl(tmp_path, row(messages=messages, images=images))).images[0].source == png()


def test_pictures_both_in_messages_and_in_the_column_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ok.png").write_bytes(png())
    chat = user({"type": "image", "image": "ok.png"}, text("?"))
    assert "both in messages and in the column" in reasons(jsonl(tmp_path, row(messages=chat, images=["ok.png"])))[0]


def test_pictures_are_not_decoded_while_reading(tmp_path: Path) -> None:
    whole = png((64, 64))
    (tmp_path / "cut.png").write_bytes(whole[:60])  # the complete header (33 bytes), but not all pixels
    prompt = read_rows(jsonl(tmp_path, row(messages=user({"type": "image", "image": "cut.png"}))))[0]
    assert prompt.images[0].size == (64, 64)
    with pytest.raises(OSError):
        prompt.images[0].load()
