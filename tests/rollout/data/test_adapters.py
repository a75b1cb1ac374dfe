"""What `data` in a recipe says of its sources: foreign columns, public data sets, bad rows, weights."""

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl.config import Source
from rl.recipe.resolve import RecipeError, load
from rl.types import Prompt
from rollout.data.adapters import ADAPTERS
from rollout.data.rows import MixedOrder, PromptOrder, RowError, read, read_rows
from stages.plan import Plan, make_plan
from tests.rollout.data.test_rows import CHAT, jsonl, parquet, png, row, user
from tests.support.command import ROOT

RECIPE = ROOT / "recipes/rlvr.yaml"


def plan(*overrides: str) -> Plan:
    return make_plan(load(RECIPE, profile="cpu", overrides=[*overrides, "data.eval=[]"]).config)


def one(path: Path, **options: Any) -> Prompt:
    """The only row of a file."""
    rows = read([Source(path=str(path), **options)])
    assert rows.bad == () and len(rows.prompts) == 1, rows.bad
    return rows.prompts[0]


# Columns


def test_foreign_columns_are_found_by_name_also_inside_others_and_need_no_id(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "1 + 1?", "extra": {"answers": ["2", "two"]}, "source": "book"})
    columns = {"messages": "question", "ground_truth": "extra.answers.0"}
    assert one(path, columns=columns, task="sums") == Prompt("rows.jsonl:1", "sums", tuple(CHAT), ground_truth="2")


def test_a_source_adds_to_the_columns_of_all(tmp_path: Path) -> None:
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


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"no column 'extra.answer', which data.columns names; there are id, task"):
        read_rows(jsonl(tmp_path, row(extra={})), columns={"ground_truth": "extra.answer"})


def test_a_plain_question_shows_its_pictures_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    prompt = one(jsonl(tmp_path, row(messages="What is it?", images="a.png")))
    assert prompt.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert prompt.images[0].size == (3, 2)


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", ""])
def test_pictures_come_as_base64(tmp_path: Path, prefix: str) -> None:
    encoded = prefix + base64.b64encode(png()).decode()
    for messages, images in ((user({"type": "image", "image": encoded}), []), ("<image>?", [encoded])):
        assert one(jsonl(tmp_path, row(messages=messages, images=images))).images[0].source == png()


def test_only_the_first_rows_are_read_where_there_is_a_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id=1), row(id=2), "{")
    assert [p.id for p in read([Source(path=str(path), limit=2)]).prompts] == ["1", "2"]


def test_a_pool_of_messages_comes_with_its_row(tmp_path: Path) -> None:
    prompt = one(jsonl(tmp_path, row(messages_pool=["two", "3"], pool_accuracy=0.5)))
    assert (prompt.messages_pool, prompt.pool_accuracy) == (("two", "3"), 0.5)


def test_streaming_is_refused_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="streaming is for data sets"):
        read([Source(path=str(jsonl(tmp_path, row())), streaming=True)])


def test_a_data_set_that_is_streamed_gives_the_same_rows_pictures_included(tmp_path: Path) -> None:
    pictures = [{"bytes": png(color=color), "path": None} for color in ("red", "blue")]
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set", *(row(id=f"r{n}", messages="?", images=[one]) for n, one in enumerate(pictures)))
    whole, streamed = (
        read([Source(path=str(tmp_path / "set"), streaming=streaming)]).prompts for streaming in (False, True)
    )
    assert streamed == whole and len(whole) == 2


# Public data sets: rows made in their documented schemas


def as_json(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


ORZ = [
    {"from": "human", "value": "1 + 1?"},
    {"from": "assistant", "ground_truth": {"value": "2", "pass_at_n": 0.5}},
]


@pytest.mark.parametrize("stored", [ORZ, {"0": ORZ[0], "1": ORZ[1]}], ids=["their file", "by datasets"])
def test_open_reasoner_zero(tmp_path: Path, stored: Any) -> None:
    prompt = one(as_json(tmp_path, stored), adapter="open_reasoner_zero", task="math")
    assert prompt == Prompt("rows.json:1", "math", tuple(CHAT), ground_truth="2", meta={"pass_at_n": 0.5})


@pytest.mark.parametrize("solution", ["[100, 200, 300, 1000]", [100, 200, 300, 1000]])
def test_perception_r1_boxes_become_fractions(tmp_path: Path, solution: Any) -> None:
    stored = {"image": {"bytes": png(), "path": None}, "problem": "red thing", "solution": solution}
    prompt = one(parquet(tmp_path, stored), adapter="perception_r1_grounding", task="grounding")
    assert prompt.ground_truth == [0.1, 0.2, 0.3, 1.0]
    assert prompt.messages[0]["content"][0] == {"type": "image"}
    assert "red thing" in prompt.messages[0]["content"][1]["text"]


def test_perception_r1_counts_are_points(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    stored = {"image": "a.png", "problem": "mugs", "clicks": [[210, 455], [640, 470]], "solution": 2}
    prompt = one(as_json(tmp_path, stored), adapter="perception_r1_counting", task="counting")
    assert (prompt.ground_truth, prompt.meta) == ([[0.21, 0.455], [0.64, 0.47]], {"count": 2})


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "user", "content": "1 + 1?"}],
        [{"from": "human", "value": "1 + 1?"}],
        "1 + 1?",
    ],
)
@pytest.mark.parametrize("truth", ["2", {"answer": "2"}])
def test_pacore_train(tmp_path: Path, conversation: Any, truth: Any) -> None:
    stored = {"conversation": conversation, "responses": ["<think>h</think>It is 2.", "3"], "ground_truth": truth}
    prompt = one(jsonl(tmp_path, stored), adapter="pacore_train", task="math")
    assert prompt.messages == tuple(CHAT)
    assert (prompt.ground_truth, prompt.messages_pool) == ("2", ("It is 2.", "3"))


def arena(**more: Any) -> dict[str, Any]:
    turns = [[{"role": "user", "content": "What is it?"}], [{"role": "assistant", "content": "A dog."}]]
    pictures = [{"bytes": png(), "path": None}]
    return {"images": pictures, "conversation": turns, "language": "English", "num_turns": 1} | more


def test_vision_arena_chat_asks_the_first_question(tmp_path: Path) -> None:
    stored = arena(conversation_id="c1", categories={"ocr": False})
    prompt = one(parquet(tmp_path, stored), adapter="vision_arena_chat", task="chat")
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["image", "text"]
    assert len(prompt.messages) == 1 and prompt.ground_truth is None and prompt.reference is None
    assert prompt.meta == {"conversation_id": "c1", "language": "English", "categories": {"ocr": False}}


def test_vision_arena_battle_remembers_who_won(tmp_path: Path) -> None:
    turns = arena()["conversation"]
    stored = arena(conversation_a=turns, conversation_b=turns, model_a="x", model_b="y", winner="model_b")
    prompt = one(parquet(tmp_path, stored), adapter="vision_arena_battle", task="chat")
    assert prompt.meta == {"language": "English", "winner": "model_b", "model_a": "x", "model_b": "y"}


@pytest.mark.parametrize(
    ("adapter", "stored", "why"),
    [
        ("open_reasoner_zero", {"question": "?"}, "is no row of open_reasoner_zero: has no '0'"),
        ("perception_r1_grounding", {"image": "a", "problem": "x", "solution": "[1, 2]"}, "are not 4 numbers"),
        (
            "perception_r1_grounding",
            {"image": "a", "problem": "x", "solution": [0, 0, 5000, 1]},
            "not between 0 and 1000",
        ),
        (
            "pacore_train",
            {"conversation": "?", "responses": [], "ground_truth": {"tests": []}},
            "the keys tests, whose meaning is not documented",
        ),
    ],
)
def test_a_row_in_another_form_is_a_bad_row(tmp_path: Path, adapter: str, stored: Any, why: str) -> None:
    (bad,) = read([Source(path=str(jsonl(tmp_path, stored)), adapter=adapter, task="t")]).bad
    assert why in bad.reason


def test_an_unknown_adapter_is_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'orz'; there are open_reasoner_zero, perception_r1_grounding"):
        read([Source(path=str(jsonl(tmp_path, row())), adapter="orz")])


def test_a_file_that_is_no_array_of_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"rows.json holds dict instead of an array"):
        read_rows(tmp_path / "rows.json")


# Bad rows and weights, as a recipe says


def sums(folder: Path, name: str, count: int, **changes: Any) -> Path:
    path = folder / f"{name}.jsonl"
    lines = (row(id=f"{name}{n}", task="arithmetic", ground_truth="2", **changes) for n in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_bad_rows_of_every_kind_are_listed_together_with_their_lines(tmp_path: Path) -> None:
    long = row(id=3, task="arithmetic", messages="1 + " * 200 + "1?")
    path = jsonl(tmp_path, row(id=1, task="chess"), row(id=2, task="arithmetic", ground_truth=None), long, "{")
    with pytest.raises(RowError) as caught:
        plan(f"data.train={path}")
    said = [(bad.line, bad.reason) for bad in caught.value.bad]
    assert [line for line, _ in said] == [1, 2, 3, 4]
    for (_, reason), part in zip(
        said, ("no reward", "has no ground_truth", "leave no room for a response", "not JSON"), strict=True
    ):
        assert part in reason


def test_bad_rows_are_left_out_and_told_of_where_the_recipe_skips_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id=1, task="arithmetic", ground_truth="2"), "{")
    made = plan(f"data.train={path}", "data.on_bad_row=skip")
    assert [p.id for p in made.train] == ["1"]
    assert [bad.line for bad in made.skipped] == [2]
    assert any("1 row(s) cannot be used" in line for line in made.lines())
    assert any("rows.jsonl:2: not JSON" in line for line in made.lines())


def test_a_run_that_would_skip_all_its_rows_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RowError):
        plan(f"data.train={jsonl(tmp_path, '{')}", "data.on_bad_row=skip")


def test_sources_with_weights_give_their_share_of_every_stretch(tmp_path: Path) -> None:
    many, few = sums(tmp_path, "many", 30), sums(tmp_path, "few", 3)
    made = plan(f"data.train=[{{path: {many}, weight: 3}}, {{path: {few}, weight: 1}}]")
    for start in (0, 8, 40):
        assert Counter(p.id[:3] for p in made.order.prompts_at(start, 8)) == {"man": 6, "few": 2}
    assert any("75% from" in line for line in made.lines())


def test_weights_for_some_sources_only_are_refused(tmp_path: Path) -> None:
    path = sums(tmp_path, "rows", 1)
    with pytest.raises(RecipeError, match="gives some of its sources a weight"):
        load(RECIPE, profile="cpu", overrides=[f"data.train=[{path}, {{path: {path}, weight: 1}}]"])


def test_a_mixed_order_can_be_entered_anywhere_and_goes_through_every_source() -> None:
    def order() -> MixedOrder:
        prompts = [[Prompt(f"{name}{n}", "t", ()) for n in range(count)] for name, count in (("a", 5), ("b", 4))]
        return MixedOrder([PromptOrder(part, seed=1) for part in prompts], [0.7, 0.3])

    drawn = [p.id for p in order().prompts_at(0, 30)]
    for position in range(25):
        assert [p.id for p in order().prompts_at(position, 5)] == drawn[position : position + 5]
    assert Counter(drawn)["a0"] >= 4 and set(drawn) == {*(f"a{n}" for n in range(5)), *(f"b{n}" for n in range(4))}


def test_a_recipe_writes_its_sources_down_as_it_read_them(tmp_path: Path) -> None:
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


def test_the_sources_shown_in_the_guide_are_valid_and_its_adapters_are_those_there_are() -> None:
    guide = (ROOT / "docs/data.md").read_text()
    shown = yaml.safe_load(guide.partition("```yaml\n")[2].partition("```")[0])["data"]
    config = load(RECIPE, profile="cpu", overrides=[f"data.train={json.dumps(shown['train'])}"]).config
    assert [source.weight for source in config.data.train] == [3, 1, 1]
    adapters = [line.split("|")[1] for line in guide.partition("| adapter |")[2].partition("\n\n")[0].splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", "".join(adapters))) == set(ADAPTERS)
    assert all(f"`{name}`" in guide for name in Source.model_fields if name != "path")
