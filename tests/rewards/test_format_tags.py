"""Tests the reward `format_tags`: responses with and without the required tags."""

from typing import Any

import pytest

from rewards import get
from tests.support.reward_samples import HOSTILE_TEXTS, assert_lowest_soon, score


@pytest.mark.parametrize("text", ["<think>so</think>42", "\n<think>\nso\n</think>\n\n42\n", "<think></think>42"])
def test_tagged_thinking_and_then_an_answer_scores_one(text: str) -> None:
    assert score("format_tags", text, None) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "<think>so</think>",
        "<think>so</think> \n",
        "<think>so 42",
        "so</think>42",
        "well <think>so</think>42",
        "</think>so<think>42",
        "</think><think>42",
        "<think>so<think></think>42",
        "<think>so</think>4</think>2",
        "<THINK>so</THINK>42",
    ],
)
def test_any_other_form_scores_zero(text: str) -> None:
    assert score("format_tags", text, None) == 0.0


def test_several_tags_must_be_in_order_and_the_answer_in_its_tag() -> None:
    params: dict[str, Any] = {"tags": ["look", "think"], "answer_tag": "answer"}
    good = "<look>a</look> <think>b</think><answer>c</answer>\n"
    assert score("format_tags", good, None, **params) == 1.0
    bad = [
        "<think>b</think><look>a</look><answer>c</answer>",
        "<look><think>b</think></look><answer>c</answer>",
        "<look>a</look>so<think>b</think><answer>c</answer>",
        good.replace("c", " "),
        good + "c",
        "<look>a</look><think>b</think>c",
    ]
    assert [score("format_tags", text, None, **params) for text in bad] == [0.0] * len(bad)


@pytest.mark.parametrize("params", [{"tags": []}, {"tags": ["<b>"]}, {"answer_tag": ""}])
def test_a_tag_is_a_name_without_brackets(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="parameter"):
        get("format_tags", params)


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_scores_the_lowest_value_within_two_seconds(text: str) -> None:
    assert_lowest_soon("format_tags", None, text)
