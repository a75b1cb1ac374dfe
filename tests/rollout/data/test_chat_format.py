"""Tests the different notations of messages and pictures in data rows."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from rl.config import Source
from rl.record.run_folder import messages_of
from rollout.data.errors import RowError
from rollout.data.rows import read, read_samples
from tests.support.data_rows import jsonl, only_prompt, parquet, png, read_rows, reasons, row, text, user
from tests.support.photos import stored


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


def shown(picture: object) -> dict[str, object]:
    return row(messages=user({"type": "image", "image": picture}))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_is_cut_off_is_a_bad_row(tmp_path: Path, kind: str) -> None:
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    for name, share in (("whole", 1.0), ("cut", 0.6)):
        encoded = io.BytesIO()
        noise.save(encoded, kind)
        (tmp_path / name).write_bytes(encoded.getvalue()[: int(share * len(encoded.getvalue()))])
    rows = read([Source(path=str(jsonl(tmp_path, shown("whole"), shown("cut") | {"id": "b"})))])
    assert [prompt.images[0].size for prompt in rows.prompts] == [(200, 200)]
    (bad,) = rows.bad
    assert bad.line == 2 and re.search(rf"{tmp_path / 'cut'} cannot be (decoded|opened as a picture): ", bad.reason)


def test_bad_rows_are_in_file_order_whatever_is_wrong_with_them(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png((64, 64))[:60])  # the complete header (33 bytes), but not all pixels
    path = jsonl(tmp_path, shown("cut.png"), "{", shown("cut.png") | {"id": "b"})
    assert [bad.line for bad in read([Source(path=str(path))]).bad] == [1, 2, 3]


def test_a_picture_of_another_format_or_with_too_many_pixels_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "bomb.png").write_bytes(png((8001, 8000)))
    (tmp_path / "empty.png").write_bytes(b"")
    wrong, bomb, empty = reasons(
        jsonl(tmp_path, *(shown(f"{name}.png") | {"id": name} for name in ("script", "bomb", "empty")))
    )
    assert "script.png cannot be opened as a picture: it is no picture in one of the formats PNG, JPEG," in wrong
    assert "its size is 8001 x 8000, but 1 to 64,000,000 pixels are allowed" in bomb
    assert "it is no picture" in empty


def test_the_file_of_a_picture_is_not_read_whole_before_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(1 << 40)  # a file with a hole, which takes no space on the disk
    (reason,) = reasons(jsonl(tmp_path, shown("huge.png")))
    assert "it has 1,099,511,627,776 bytes, more than the maximum" in reason
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    (reason,) = reasons(jsonl(tmp_path, shown("rows.jsonl")))
    assert "it is no picture" in reason


def test_rows_use_only_pictures_of_their_folder_and_of_the_folders_that_the_user_names(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    (other / "private.png").write_bytes(png())
    (data / "link.png").symlink_to(other / "private.png")
    named = (str(other / "private.png"), "../other/private.png", "link.png", f"{data}/x/../../other/private.png")
    path = jsonl(data, *(shown(name) | {"id": name} for name in named))
    for reason in reasons(path):
        assert reason == (
            f"picture {other / 'private.png'} is outside of the data's folder; if the row may use it, add its folder "
            "to data.picture_folders (or --picture-folder)"
        )
    assert len(reasons(path)) == 4
    assert len(read_rows(path, picture_folders=[str(other)])) == 4


def test_a_source_cannot_use_the_pictures_of_another_source(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "own.png").write_bytes(png())
    sources = [jsonl(first, shown("own.png")), jsonl(second, shown("../first/own.png") | {"id": "b"})]
    rows = read([Source(path=str(path)) for path in sources])
    assert len(rows.prompts) == 1 and "is outside of the data's folder" in rows.bad[0].reason


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, "loop.png", "/dev/zero", "."])
def test_a_path_that_no_picture_can_have_is_a_bad_row(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (reason,) = reasons(jsonl(tmp_path, shown(path)))
    assert reason.startswith("picture ")


@pytest.mark.parametrize("digest", ["../../x", "A" * 64, "", 7])
def test_only_samples_may_have_a_digest_in_place_of_a_picture(tmp_path: Path, digest: object) -> None:
    for value in (digest, "a" * 64):
        (reason,) = reasons(jsonl(tmp_path, row(messages=user({"type": "image", "digest": value}))))
        assert "a picture must be a path or bytes" in reason or "must be {type: text" in reason
    with pytest.raises(RowError, match=r"digest of a picture must be 64|must be \{type: text"):
        read_samples(jsonl(tmp_path, row(messages=user({"type": "image", "digest": digest}), response="4")))


def test_a_part_can_say_that_its_picture_must_not_be_turned(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(stored(6))
    turned, lying = ({"type": "image", "image": "one.jpg"} | more for more in ({}, {"as_stored": True}))
    prompt = only_prompt(jsonl(tmp_path, row(messages=user(turned, lying))))
    first, second = prompt.images
    assert first.size == second.size[::-1] and first.digest != second.digest
    written = messages_of(prompt)[0]["content"]
    assert [part.get("as_stored", False) for part in written] == [False, True]
    again = only_prompt(jsonl(tmp_path, row(messages=[{"role": "user", "content": written}])))
    assert again.images == prompt.images
