"""Tests data rows: columns, sources, ids, the reasons why rows cannot be used, and samples."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.config import Source
from rl.recipe.resolve import load
from rl.types import Prompt
from rollout.data.errors import RowError
from rollout.data.rows import COLUMNS, read, read_samples
from tests.support.command import ROOT
from tests.support.data_rows import CHAT, jsonl, only_prompt, parquet, png, read_rows, reasons, row, sums, text, user

RECIPE = ROOT / "recipes/rlvr.yaml"


def test_a_text_row_becomes_a_prompt_with_its_answer_and_meta(tmp_path: Path) -> None:
    prompt = read_rows(jsonl(tmp_path, row(id=7, meta={"level": 3})))[0]
    assert prompt == Prompt("7", "sums", tuple(CHAT), ground_truth=2, meta={"level": 3})


def test_fields_that_arrow_fills_with_nulls_are_absent(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    chat = user(text("what is "), {"type": "image", "image": "one.png"})  # Arrow gives every part the keys of all parts
    path = parquet(tmp_path, row(messages=chat, ground_truth=None, reference="a dog"))
    prompt = read_rows(path)[0]
    assert prompt.messages[0]["content"] == [text("what is "), {"type": "image"}]
    assert (prompt.ground_truth, prompt.reference) == (None, "a dog")


def test_a_picture_knows_the_size_in_which_the_model_is_shown_it(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    path = jsonl(tmp_path, row(messages=user({"type": "image", "image": "one.png"})))
    (plain,) = read([Source(path=str(path))]).prompts
    (shown,) = read([Source(path=str(path))], shown=lambda size: (2 * size[0], size[1])).prompts
    width, height = plain.images[0].size
    assert plain.images[0].shown is None and shown.images[0].shown == (2 * width, height)
    assert plain == shown  # the same row, with or without a model


def test_several_sources_are_read_in_order_and_must_not_have_the_same_ids(tmp_path: Path) -> None:
    first = jsonl(tmp_path, row(id=1), row(id=2))
    second = tmp_path / "more.jsonl.gz"
    second.write_bytes(gzip.compress(json.dumps(row(id="1")).encode()))
    assert [prompt.id for prompt in read_rows([first])] == ["1", "2"]
    with pytest.raises(RowError, match=r"more.jsonl.gz:1: id '1' was used before, at .*rows.jsonl:1"):
        read_rows([first, second])


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"uid": 1, "task": "sums", "messages": CHAT, "solution": "2"})
    assert read_rows(path, columns={"id": "uid", "ground_truth": "solution"})[0].ground_truth == "2"
    assert "data.columns refers to 'nope'" in reasons(path, columns={"id": "nope"})[0]
    with pytest.raises(ValueError, match=r"data.columns: 'uid' is not a column of rows"):
        read_rows(path, columns={"uid": "id"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "id must be a text or an integer, but is missing"),
        ({"id": True}, "id must be a text or an integer, but is bool True"),
        ({"task": 3}, "task must be a text, but is int 3"),
        ({"task": "a/b"}, "has a '/'"),
        ({"task": "mean"}, "would share its name with the metric reward/mean"),
        ({"messages": 5}, "messages must be a question or a list"),
        ({"messages": " "}, "messages must be a question or a list"),
        ({"messages": []}, "messages must be a question or a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 0 is empty"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "key 'name'"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "2"}]}, "last message is from 'assistant'"),
        ({"messages": user({"type": "video", "video": "x"})}, "must be {type: text"),
        ({"messages": user(text("<im_patch>"))}, "contains '<im_patch>', a control token of the model"),
        ({"messages": user(text("<image>?"))}, "messages has 1 mark(s) <image>, but images has 0 picture(s)"),
        (
            {"messages": user(text("?")), "images": ["ok.png"]},
            "messages has 0 mark(s) <image>, but images has 1 picture(s)",
        ),
        ({"messages": user({"type": "image", "image": "no.png"})}, "no.png does not exist"),
        ({"messages": user({"type": "image", "image": "bad.png"})}, "bad.png cannot be opened as a picture"),
        ({"messages": user({"type": "image", "image": "http://x/y.png"})}, "is a URL; save the picture"),
        ({"image": "ok.png"}, "column 'image' is not read; did you mean 'images'?"),
        ({"ground_truth": float("nan")}, "ground_truth cannot be written as JSON"),
        ({"reference": 5}, "reference must be a text"),
        ({"meta": [1]}, "meta must be an object"),
        ({"messages": "?", "images": ["data:image/png,abc"]}, "is a data URL without base64"),
        ({"messages": "?", "images": ["data:image/png;base64,a"]}, "is not base64"),
        ({"messages": "?", "images": ["data:image/png;base64,YWJj"]}, "the picture in base64 cannot be opened"),
        ({"messages_pool": "one"}, "messages_pool must be a list of texts"),
        ({"messages_pool": ["one", " "]}, "messages_pool must be a list of texts"),
        ({"pool_accuracy": 1.5}, "pool_accuracy must be between 0 and 1, but is float 1.5"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (tmp_path / "ok.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(png()[:10])
    found = reasons(jsonl(tmp_path, row(**changes)), reserved=["<im_patch>"])
    assert len(found) == 1 and reason in found[0]


def test_a_task_without_a_reward_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row())
    assert reasons(path, tasks=["counting", "chat"]) == ["task 'sums' has no reward; rewards exist for chat, counting"]
    assert len(read_rows(path, tasks=["sums"])) == 1


def test_columns_are_found_inside_other_columns_and_such_rows_need_no_id(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "1 + 1?", "extra": {"answers": ["2", "two"]}, "source": "book"})
    columns = {"messages": "question", "ground_truth": "extra.answers.0"}
    assert only_prompt(path, columns=columns, task="sums") == Prompt(
        "rows.jsonl:1", "sums", tuple(CHAT), ground_truth="2"
    )


def test_the_columns_of_a_source_are_added_to_the_columns_for_all_sources(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = jsonl(tmp_path / "a", {"id": 1, "q": "one?", "answer": "1"})
    second = jsonl(tmp_path / "b", {"id": 2, "question": "two?", "answer": "2"})
    rows = read(
        [Source(path=str(first), task="t"), Source(path=str(second), task="t", columns={"messages": "question"})],
        columns={"messages": "q", "ground_truth": "answer"},
    )
    assert [(p.id, p.messages[0]["content"], p.ground_truth) for p in rows.prompts] == [
        ("1", "one?", "1"),
        ("2", "two?", "2"),
    ]
    assert rows.sources == (0, 1)


def test_the_error_for_a_missing_column_lists_the_columns_of_the_row(tmp_path: Path) -> None:
    with pytest.raises(
        RowError, match=r"data.columns refers to 'extra.answer', but the row only has the columns id, task"
    ):
        read_rows(jsonl(tmp_path, row(extra={})), columns={"ground_truth": "extra.answer"})


def test_a_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id=1), row(id=2), "{")
    assert [p.id for p in read([Source(path=str(path), limit=2)]).prompts] == ["1", "2"]


def test_a_row_may_have_a_pool_of_messages(tmp_path: Path) -> None:
    prompt = only_prompt(jsonl(tmp_path, row(messages_pool=["two", "3"], pool_accuracy=0.5)))
    assert (prompt.messages_pool, prompt.pool_accuracy) == (("two", "3"), 0.5)


def test_a_saved_recipe_has_the_sources_as_they_were_written(tmp_path: Path) -> None:
    sources = [str(sums(tmp_path, "a", 1)), {"path": str(sums(tmp_path, "b", 1)), "limit": 1}]
    resolved = load(RECIPE, profile="cpu", overrides=[f"data.train={json.dumps(sources)}"])
    assert resolved.plain()["data"]["train"] == sources
    saved = tmp_path / "recipe.yaml"
    saved.write_text(resolved.yaml())
    assert load(saved).config == resolved.config


def test_a_source_beside_the_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums(tmp_path, "b", 1)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: {RECIPE}\ndata: {{train: [{{path: b.jsonl, limit: 1}}]}}\n")
    monkeypatch.chdir("/")
    assert load(recipe, overrides=["model.path=/m"]).config.data.train[0].path == str(tmp_path / "b.jsonl")


def test_samples_are_rows_with_a_response_and_need_no_other_columns(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(
        '{"response": "5", "ground_truth": 5}\n'
        '{"id": "a", "task": "sums", "messages": [{"role": "user", "content": "2 + 3?"}], "response": "", '
        '"finish": "length", "reward": 0.0}\n'
        '{"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "digest": "'
        + "d1" * 32
        + '"}]}], "response": "x"}\n'
    )
    bare, whole, seen = (sample.rollout for sample in read_samples(file))
    assert (bare.prompt.id, bare.prompt.messages, bare.prompt.ground_truth, bare.text) == ("line 1", (), 5, "5")
    assert (whole.prompt.task, whole.finish, len(whole.prompt.messages)) == ("sums", "length", 1)
    assert [picture.digest for picture in seen.prompt.images] == ["d1" * 32]  # the sample has only the picture's digest


@pytest.mark.parametrize(
    ("line", "why"),
    [('{"id": "a"}', "response must be a text, but is missing"), ('{"response": "", "finish": "no"}', "finish must")],
)
def test_a_sample_without_a_valid_response_is_reported_with_its_line(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(f'{{"response": "fine"}}\n{line}\n')
    with pytest.raises(RowError, match=rf"samples.jsonl:2: {why}"):
        read_samples(file)


WORDS = ("<image>", "user", "text", "image", "data:image/png;base64,AA", "data:,", "/dev/null", "")
KEYS = ("", "type", "text", "image", "role", "content", "bytes", "path", "digest")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
CHANGED = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=3).map(lambda changes: row(**changes))


@given(rows=st.lists(CHANGED | VALUES | st.binary(max_size=20), min_size=1))
def test_every_line_of_a_file_is_a_row_or_a_bad_row(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    lines = [one.replace(b"\n", b"") if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    expected = sum(bool(line.strip()) for line in lines)
    if expected:
        found = read([Source(path=str(file))])
        assert len(found.prompts) + len(found.bad) == expected
    else:
        with pytest.raises(ValueError, match="has no rows"):
            read([Source(path=str(file))])
