"""Tests the adapters of public data sets, with rows in the documented schemas."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl.config import Source
from rl.recipe.resolve import load
from rl.types import Prompt
from rollout.data.adapters import ADAPTERS
from rollout.data.rows import read
from tests.support.command import ROOT
from tests.support.data_rows import CHAT, json_array, jsonl, only_prompt, parquet, png, row

RECIPE = ROOT / "recipes/rlvr.yaml"


ORZ = [
    {"from": "human", "value": "1 + 1?"},
    {"from": "assistant", "ground_truth": {"value": "2", "pass_at_n": 0.5}},
]


@pytest.mark.parametrize("stored", [ORZ, {"0": ORZ[0], "1": ORZ[1]}], ids=["their file", "by datasets"])
def test_open_reasoner_zero(tmp_path: Path, stored: Any) -> None:
    prompt = only_prompt(json_array(tmp_path, stored), adapter="open_reasoner_zero", task="math")
    assert prompt == Prompt("rows.json:1", "math", tuple(CHAT), ground_truth="2", meta={"pass_at_n": 0.5})


@pytest.mark.parametrize("solution", ["[100, 200, 300, 1000]", [100, 200, 300, 1000]])
def test_perception_r1_boxes_become_fractions(tmp_path: Path, solution: Any) -> None:
    stored = {"image": {"bytes": png(), "path": None}, "problem": "red thing", "solution": solution}
    prompt = only_prompt(parquet(tmp_path, stored), adapter="perception_r1_grounding", task="grounding")
    assert prompt.ground_truth == [0.1, 0.2, 0.3, 1.0]
    assert prompt.messages[0]["content"][0] == {"type": "image"}
    assert "red thing" in prompt.messages[0]["content"][1]["text"]


def test_perception_r1_counts_are_points(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    stored = {"image": "a.png", "problem": "mugs", "clicks": [[210, 455], [640, 470]], "solution": 2}
    prompt = only_prompt(json_array(tmp_path, stored), adapter="perception_r1_counting", task="counting")
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
    prompt = only_prompt(jsonl(tmp_path, stored), adapter="pacore_train", task="math")
    assert prompt.messages == tuple(CHAT)
    assert (prompt.ground_truth, prompt.messages_pool) == ("2", ("It is 2.", "3"))


def arena(**more: Any) -> dict[str, Any]:
    turns = [[{"role": "user", "content": "What is it?"}], [{"role": "assistant", "content": "A dog."}]]
    pictures = [{"bytes": png(), "path": None}]
    return {"images": pictures, "conversation": turns, "language": "English", "num_turns": 1} | more


def test_vision_arena_chat_has_the_first_question(tmp_path: Path) -> None:
    stored = arena(conversation_id="c1", categories={"ocr": False})
    prompt = only_prompt(parquet(tmp_path, stored), adapter="vision_arena_chat", task="chat")
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["image", "text"]
    assert len(prompt.messages) == 1 and prompt.ground_truth is None and prompt.reference is None
    assert prompt.meta == {"conversation_id": "c1", "language": "English", "categories": {"ocr": False}}


def test_vision_arena_battle_keeps_the_winner(tmp_path: Path) -> None:
    turns = arena()["conversation"]
    stored = arena(conversation_a=turns, conversation_b=turns, model_a="x", model_b="y", winner="model_b")
    prompt = only_prompt(parquet(tmp_path, stored), adapter="vision_arena_battle", task="chat")
    assert prompt.meta == {"language": "English", "winner": "model_b", "model_a": "x", "model_b": "y"}


def pictured(**columns: Any) -> dict[str, Any]:
    return {"image": {"bytes": png(), "path": None}, **columns}


def test_geometry3k_shows_its_picture_at_the_mark(tmp_path: Path) -> None:
    stored = {"images": [{"bytes": png(), "path": None}], "problem": "<image>Find x.", "answer": r"\\frac{1}{2}"}
    prompt = only_prompt(parquet(tmp_path, stored), adapter="geometry3k", task="geometry")
    assert prompt.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Find x."}]
    assert prompt.ground_truth == stored["answer"] and len(prompt.images) == 1


def test_clevr_count_takes_the_number_from_the_answer_tag(tmp_path: Path) -> None:
    stored = pictured(problem="How many items are there?", solution="<answer> 3 </answer>")
    prompt = only_prompt(parquet(tmp_path, stored), adapter="clevr_count", task="counting")
    assert prompt.ground_truth == "3" and prompt.messages[0]["content"][0] == {"type": "image"}


def test_refcoco_boxes_become_corners_in_pixels(tmp_path: Path) -> None:
    stored = pictured(question="?", answer=["the left cup", "cup"], bbox=[10.5, 20.0, 30.0, 40.0], file_name="a.jpg")
    prompt = only_prompt(parquet(tmp_path, stored), adapter="refcoco", task="grounding")
    assert prompt.ground_truth == [10.5, 20.0, 40.5, 60.0]
    assert "the left cup" in prompt.messages[0]["content"][1]["text"]
    assert prompt.meta == {"phrases": ["the left cup", "cup"]}


def test_multimodal_open_r1_takes_the_answer_after_the_thinking(tmp_path: Path) -> None:
    stored = pictured(problem="Which is it?", solution="<think>It is 2.</think>\n\n<answer> B </answer>")
    prompt = only_prompt(parquet(tmp_path, stored), adapter="multimodal_open_r1", task="visual")
    assert prompt.ground_truth == "B"


@pytest.mark.parametrize(
    ("adapter", "stored", "why"),
    [
        ("open_reasoner_zero", {"question": "?"}, "does not fit the adapter open_reasoner_zero: it has no '0'"),
        ("perception_r1_grounding", {"image": "a", "problem": "x", "solution": "[1, 2]"}, "is not a list of 4 numbers"),
        (
            "perception_r1_grounding",
            {"image": "a", "problem": "x", "solution": [0, 0, 5000, 1]},
            "must be between 0 and 1000",
        ),
        ("clevr_count", {"image": "a", "problem": "x", "solution": "3"}, "has 0 parts <answer>...</answer>"),
        ("refcoco", {"image": "a", "answer": [" "], "bbox": [0, 0, 1, 1]}, "its column answer has no phrase"),
        ("refcoco", {"image": "a", "answer": ["cup"], "bbox": [0, 0, 1]}, "is not a list of 4 numbers"),
        ("geometry3k", {"images": ["a"], "problem": "x"}, "it has no 'answer'"),
        (
            "pacore_train",
            {"conversation": "?", "responses": [], "ground_truth": {"tests": []}},
            "the keys tests, whose meaning is not documented",
        ),
    ],
)
def test_a_row_with_another_schema_is_a_bad_row(tmp_path: Path, adapter: str, stored: Any, why: str) -> None:
    (bad,) = read([Source(path=str(jsonl(tmp_path, stored)), adapter=adapter, task="t")]).bad
    assert why in bad.reason


def test_the_error_for_an_unknown_adapter_lists_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'orz'; adapters are open_reasoner_zero, perception_r1_grounding"):
        read([Source(path=str(jsonl(tmp_path, row())), adapter="orz")])


def test_the_sources_in_docs_are_valid_and_docs_list_all_adapters_and_options() -> None:
    guide = (ROOT / "docs/data.md").read_text()
    shown = yaml.safe_load(guide.partition("```yaml\n")[2].partition("```")[0])["data"]
    config = load(RECIPE, profile="cpu", overrides=[f"data.train={json.dumps(shown['train'])}"]).config
    assert [source.weight for source in config.data.train] == [3, 1, 1]
    adapters = [line.split("|")[1] for line in guide.partition("| adapter |")[2].partition("\n\n")[0].splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", "".join(adapters))) == set(ADAPTERS)
    assert all(f"`{name}`" in guide for name in Source.model_fields if name != "path")
