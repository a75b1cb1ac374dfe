"""Data rows: what becomes of good ones, what is said of bad ones, and the order they are drawn in."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rl.types import Prompt
from rollout.data.rows import PromptOrder, RowError, read_rows, read_samples

CHAT = [{"role": "user", "content": "1 + 1?"}]


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "task": "sums", "messages": CHAT, "ground_truth": 2} | changes


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def png(size: tuple[int, int] = (3, 2), color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def reasons(path: Path, **options: Any) -> list[str]:
    with pytest.raises(RowError) as caught:
        read_rows(path, **options)
    return [bad.reason for bad in caught.value.bad]


def test_a_text_row_becomes_a_prompt_with_its_answer_and_meta(tmp_path: Path) -> None:
    prompt = read_rows(jsonl(tmp_path, row(id=7, meta={"level": 3})))[0]
    assert prompt == Prompt("7", "sums", tuple(CHAT), ground_truth=2, meta={"level": 3})


def test_content_without_a_picture_is_one_text_however_it_was_written(tmp_path: Path) -> None:
    prompt = read_rows(jsonl(tmp_path, row(messages=user(text("1 + "), text("1?")))))[0]
    assert prompt.messages[0]["content"] == "1 + 1?"


def test_picture_parts_become_placeholders_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((3, 2)))
    (tmp_path / "two.png").write_bytes(png((5, 4)))
    two, one = ({"type": "image", "image": f"{name}.png"} for name in ("two", "one"))
    prompt = read_rows(jsonl(tmp_path, row(messages=user(two, text("or"), one))))[0]
    assert prompt.messages[0]["content"] == [{"type": "image"}, text("or"), {"type": "image"}]
    assert [picture.size for picture in prompt.images] == [(5, 4), (3, 2)]


def test_marks_in_the_text_take_the_column_images_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((3, 2)))
    (tmp_path / "two.png").write_bytes(png((5, 4)))
    chat = [{"role": "user", "content": "<image>left, <image>"}]
    prompt = read_rows(jsonl(tmp_path, row(messages=chat, images=["one.png", "two.png"])))[0]
    assert prompt.messages[0]["content"] == [{"type": "image"}, text("left, "), {"type": "image"}]
    assert [picture.size for picture in prompt.images] == [(3, 2), (5, 4)]


def test_parts_without_a_picture_of_their_own_take_the_column_images(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    chat = user({"type": "image"}, text("what?"))
    assert len(read_rows(jsonl(tmp_path, row(messages=chat, images=["one.png"])))[0].images) == 1


def test_parquet_rows_hold_pictures_as_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((3, 2)))
    chat = [{"role": "user", "content": "<image><image>"}]
    images = [{"bytes": png((5, 4)), "path": None}, {"bytes": None, "path": "one.png"}]
    prompt = read_rows(parquet(tmp_path, row(messages=chat, images=images, ground_truth="x")))[0]
    assert [picture.size for picture in prompt.images] == [(5, 4), (3, 2)]
    assert prompt.images[0].source == png((5, 4))


def test_fields_that_arrow_fills_with_nulls_are_absent(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    chat = user(text("what is "), {"type": "image", "image": "one.png"})  # one schema: text and image in both
    path = parquet(tmp_path, row(messages=chat, ground_truth=None, reference="a dog"))
    prompt = read_rows(path)[0]
    assert prompt.messages[0]["content"] == [text("what is "), {"type": "image"}]
    assert (prompt.ground_truth, prompt.reference) == (None, "a dog")


def test_a_hugging_face_folder_gives_the_same_prompts_as_its_rows(tmp_path: Path) -> None:
    import datasets

    rows = [row(id=str(n), messages=[{"role": "user", "content": "<image>?"}], images=[png()]) for n in range(3)]
    saved = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict({"held_out": saved}).save_to_disk(tmp_path / "set")
    assert read_rows(f"{tmp_path}/set:held_out") == read_rows(parquet(tmp_path, *rows))
    with pytest.raises(ValueError, match="no split 'train'"):
        read_rows(tmp_path / "set")


def test_several_sources_are_read_one_after_the_other_and_share_their_ids(tmp_path: Path) -> None:
    first = jsonl(tmp_path, row(id=1), row(id=2))
    second = tmp_path / "more.jsonl.gz"
    second.write_bytes(gzip.compress(json.dumps(row(id="1")).encode()))
    assert [prompt.id for prompt in read_rows([first])] == ["1", "2"]
    with pytest.raises(RowError, match=r"more.jsonl.gz:1: id '1' was used before, at .*rows.jsonl:1"):
        read_rows([first, second])


def test_columns_can_be_called_differently(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"uid": 1, "task": "sums", "messages": CHAT, "solution": "2"})
    assert read_rows(path, columns={"id": "uid", "ground_truth": "solution"})[0].ground_truth == "2"
    assert "no column 'nope'" in reasons(path, columns={"id": "nope"})[0]
    with pytest.raises(ValueError, match=r"data.columns: 'uid' is no column of ours"):
        read_rows(path, columns={"uid": "id"})


def test_every_bad_row_is_listed_with_file_line_and_reason(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id=1), "{oops", "", row(id=2), "[1]", row(id=1))
    with pytest.raises(RowError) as caught:
        read_rows(path)
    assert [bad.line for bad in caught.value.bad] == [2, 5, 6]
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 bad data row(s):"
    assert lines[1].startswith(f"  {path}:2: not JSON")


def test_the_message_spells_out_twenty_bad_rows_and_counts_the_rest(tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        read_rows(jsonl(tmp_path, *["{"] * 25))
    assert (len(caught.value.bad), len(str(caught.value).splitlines())) == (25, 1 + 20 + 1)
    assert str(caught.value).endswith("... and 5 more")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "id must be a text or an integer, this is missing"),
        ({"id": True}, "id must be a text or an integer, this is bool True"),
        ({"task": 3}, "task must be a text, this is int 3"),
        ({"task": "a/b"}, "has a '/'"),
        ({"task": "mean"}, "would share its name with the metric reward/mean"),
        ({"messages": 5}, "messages must be a question or a list"),
        ({"messages": " "}, "messages must be a question or a list"),
        ({"messages": []}, "messages must be a question or a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 0 is empty"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "key 'name'"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "2"}]}, "last message is from 'assistant'"),
        ({"messages": user({"type": "image_url", "image_url": "x"})}, "is neither {type: text"),
        ({"messages": user(text("<im_patch>"))}, "holds '<im_patch>', control text of the model"),
        ({"messages": user(text("<image>?"))}, "1 <image> mark(s) in messages for 0 picture(s)"),
        (
            {"messages": user(text("?")), "images": ["ok.png"]},
            "0 <image> mark(s) in messages for 1 picture(s)",
        ),
        ({"messages": user({"type": "image", "image": "no.png"})}, "no.png does not exist"),
        ({"messages": user({"type": "image", "image": "bad.png"})}, "bad.png does not open as a picture"),
        ({"messages": user({"type": "image", "image": "http://x/y.png"})}, "is a URL; save it"),
        ({"image": "ok.png"}, "column 'image' is not read; did you mean 'images'?"),
        ({"ground_truth": float("nan")}, "ground_truth holds what JSON cannot"),
        ({"reference": 5}, "reference must be a text"),
        ({"meta": [1]}, "meta must be an object"),
        ({"messages": "?", "images": ["data:image/png,abc"]}, "is a data URL without base64"),
        ({"messages": "?", "images": ["data:image/png;base64,a"]}, "is no base64"),
        ({"messages": "?", "images": ["data:image/png;base64,YWJj"]}, "the picture in base64 does not open"),
        ({"messages_pool": "one"}, "messages_pool must be a list of texts"),
        ({"messages_pool": ["one", " "]}, "messages_pool must be a list of texts"),
        ({"pool_accuracy": 1.5}, "pool_accuracy must be between 0 and 1, this is float 1.5"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (tmp_path / "ok.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(png()[:10])
    found = reasons(jsonl(tmp_path, row(**changes)), reserved=["<im_patch>"])
    assert len(found) == 1 and reason in found[0]


def test_a_task_without_a_reward_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row())
    assert reasons(path, tasks=["counting", "chat"]) == ["task 'sums' has no reward; the recipe has chat, counting"]
    assert len(read_rows(path, tasks=["sums"])) == 1


def test_pictures_given_twice_over_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ok.png").write_bytes(png())
    chat = user({"type": "image", "image": "ok.png"}, text("?"))
    assert "both in messages and in the column" in reasons(jsonl(tmp_path, row(messages=chat, images=["ok.png"])))[0]


def test_text_that_is_not_utf_8_is_a_bad_row_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    assert reasons(path) == ["not UTF-8: invalid start byte at byte 8"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("no_folder", None, "does not exist"),
        ("rows.csv", b"a,b", "of an unknown kind; give a .jsonl"),
        ("rows.jsonl", b"\n", "has no rows"),
        ("rows.parquet", b"PAR?", "no readable Parquet file"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08", "damaged gzip file"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_pictures_are_not_decoded_while_reading(tmp_path: Path) -> None:
    whole = png((64, 64))
    (tmp_path / "cut.png").write_bytes(whole[:60])  # a whole header (33 bytes) and too little of the pixels
    prompt = read_rows(jsonl(tmp_path, row(messages=user({"type": "image", "image": "cut.png"}))))[0]
    assert prompt.images[0].size == (64, 64)
    with pytest.raises(OSError):
        prompt.images[0].load()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(n), "sums", tuple(CHAT)) for n in range(count)]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def test_each_row_comes_once_per_pass_also_when_batches_straddle_it() -> None:
    order = PromptOrder(prompts(7), seed=1)
    drawn = [one for start in range(0, 21, 3) for one in ids(order.prompts_at(start, 3))]  # 7 batches of 3
    for start in (0, 7, 14):
        assert sorted(drawn[start : start + 7]) == [str(n) for n in range(7)]
    assert drawn[:7] != drawn[7:14]


def test_any_position_can_be_entered_afresh() -> None:
    drawn = ids(PromptOrder(prompts(5), seed=1).prompts_at(0, 23))
    for position in range(20):
        assert ids(PromptOrder(prompts(5), seed=1).prompts_at(position, 3)) == drawn[position : position + 3]


def test_the_order_depends_on_the_seed_and_not_on_the_file() -> None:
    forward, backward = prompts(6), prompts(6)[::-1]
    one = ids(PromptOrder(forward, seed=1).prompts_at(0, 6))
    assert one == ids(PromptOrder(backward, seed=1).prompts_at(0, 6))
    assert one != ids(PromptOrder(forward, seed=2).prompts_at(0, 6))


def test_more_prompts_than_rows_come_from_several_passes() -> None:
    drawn = ids(PromptOrder(prompts(2), seed=0).prompts_at(1, 5))
    assert len(drawn) == 5 and sorted(drawn[1:3]) == ["0", "1"]


# Samples


def test_samples_are_rows_with_a_response_and_may_say_little_else(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(
        '{"response": "5", "ground_truth": 5}\n'
        '{"id": "a", "task": "sums", "messages": [{"role": "user", "content": "2 + 3?"}], "response": "", '
        '"finish": "length", "reward": 0.0}\n'
        '{"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "digest": "d1"}]}], "response": "x"}\n'
    )
    bare, whole, seen = read_samples(file)
    assert (bare.prompt.id, bare.prompt.messages, bare.prompt.ground_truth, bare.text) == ("line 1", (), 5, "5")
    assert (whole.prompt.task, whole.finish, len(whole.prompt.messages)) == ("sums", "length", 1)
    assert [picture.digest for picture in seen.prompt.images] == ["d1"]  # known by name only: it came as bytes


@pytest.mark.parametrize(
    ("line", "why"),
    [('{"id": "a"}', "response must be a text, this is missing"), ('{"response": "", "finish": "no"}', "finish must")],
)
def test_a_sample_without_a_proper_response_is_told_with_its_line(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(f'{{"response": "fine"}}\n{line}\n')
    with pytest.raises(RowError, match=rf"samples.jsonl:2: {why}"):
        read_samples(file)
