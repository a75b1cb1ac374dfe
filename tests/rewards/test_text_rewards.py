"""Rewards for read-out text, choices and format, and the reward model."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from rewards import Invalid, Score, get
from rewards.ocr import LONGEST_TRUTH
from rl.types import Prompt, Rollout
from tests.rewards.test_registry import HOSTILE, MEGABYTE, rollout, score
from tests.support.tiny import make_text_model, randomize

# Reading text


def test_ocr_is_one_minus_edits_over_the_longer_length() -> None:
    assert score("ocr", "kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert score("ocr", "ab", "abcd") == 0.5
    assert score("ocr", "abcd", "ab") == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "Platform 9,  exit B",
        "Platform 9,\nexit B",
        "It says:\nAnswer: Platform 9, exit B",
        r"\boxed{Platform 9, exit B}",
        "```text\nPlatform 9, exit B\n```",
        "\u200ePlatform\u00a09, exit \uff22",
    ],
)
def test_ocr_forgets_blanks_unicode_forms_and_the_marks_around_the_text(text: str) -> None:
    assert score("ocr", text, "Platform 9, exit B") == 1.0


def test_ocr_heeds_case_unless_told_not_to() -> None:
    assert score("ocr", "stop", "STOP") == 0.0
    assert score("ocr", "stop", "STOP", case_sensitive=False) == 1.0


def test_a_true_text_that_holds_a_mark_itself_is_read_out_whole() -> None:
    assert score("ocr", "Question: 6 x 7? Answer: 42", "Question: 6 x 7? Answer: 42") == 1.0


def test_the_nearest_of_several_acceptable_texts_counts() -> None:
    assert score("ocr", "colour", ["color", "colour"]) == 1.0


def test_a_page_of_text_is_compared_soon_and_a_far_longer_answer_is_not() -> None:
    page = "the quick brown fox. " * (LONGEST_TRUTH // 21)
    start = time.process_time()
    assert score("ocr", page[::-1] * 3, page) < 0.5
    assert score("ocr", page * 5, page) == 0.0
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("truth", [None, "", "  ", [], ["a", ""], {"text": "a"}, "a" * (LONGEST_TRUTH + 1)])
def test_a_row_without_a_usable_true_text_is_at_fault(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("ocr", "a", truth)


# Choices

OPTIONS = ["Rome", "Paris", "A cat", "C major"]


def chosen(text: str, truth: Any, options: Any = None) -> float:
    meta = {} if options is None else {"options": options}
    return float(get("choice")(Rollout(Prompt("row-1", "t", (), ground_truth=truth, meta=meta), text)).value)


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "(b)",
        "B.",
        "**B**",
        "B) Paris",
        "B. Paris",
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        "Answer: (B)",
        "**Answer:** **B**",
        "The answer is B",
        "The answer is B because A is too small.",
        "The correct option is (B).",
        "I think it's B.",
        "It is not clear, but option B is right",
        "A is too small.\nAnswer: B",
    ],
)
def test_a_letter_is_read_in_the_usual_ways_to_write_it(text: str) -> None:
    assert chosen(text, "B") == chosen(text, "(b)") == chosen(text, "Paris", OPTIONS) == 1.0
    assert chosen(text, "A") == chosen(text, "Rome", OPTIONS) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "A, B",
        r"\boxed{A, B}",
        r"\boxed{A and B}",
        "The answer is A or B",
        "option A or option B",
        "A/B",
        "(A) (B) (C) (D)",
        "A. B. C. D.",
        "Answer: A B C D",
        "AB",
        "none of them",
        "",
    ],
)
def test_several_letters_or_none_are_wrong_whichever_is_right(text: str) -> None:
    assert [chosen(text, letter, OPTIONS) for letter in "ABCD"] == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("paris.", "B"),
        ("The answer is Paris", "B"),
        ("A cat", "C"),
        ("C. A cat", "C"),
        ("C major", "D"),
        ("D. C major", "D"),
    ],
)
def test_the_text_of_an_option_counts_as_its_letter(text: str, letter: str) -> None:
    by_letter = dict(zip("ABCD", OPTIONS, strict=True))
    assert chosen(text, letter, OPTIONS) == chosen(text, letter, by_letter) == 1.0
    assert chosen(text, "A", OPTIONS) == 0.0


def test_the_articles_a_and_i_are_no_letters() -> None:
    assert chosen("A big house", "A") == chosen("I see", "I") == chosen("a", "B") == 0.0


@pytest.mark.parametrize(
    ("truth", "options"),
    [(None, None), ("K", None), ("Paris", None), ("E", OPTIONS), ("London", OPTIONS), (1, OPTIONS), ("A", "AB")],
)
def test_a_row_without_a_usable_choice_is_at_fault(truth: Any, options: Any) -> None:
    with pytest.raises(Invalid, match=r"row-1"):
        chosen("A", truth, options)


# Format


@pytest.mark.parametrize("text", ["<think>so</think>42", "\n<think>\nso\n</think>\n\n42\n", "<think></think>42"])
def test_thinking_and_then_an_answer_is_the_format(text: str) -> None:
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
def test_everything_else_is_not(text: str) -> None:
    assert score("format_tags", text, None) == 0.0


def test_other_tags_in_order_and_a_tag_for_the_answer() -> None:
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


# The reward model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 classifier with one label over forty words, and a template of one word per turn."""
    folder = tmp_path_factory.mktemp("reward_model")
    make_text_model(folder, tied=True)
    _save_classifier(folder, folder, labels=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}w0 {{ m.content }} <eos> {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def _save_classifier(source: Path, target: Path, labels: int) -> None:
    config = Qwen3Config.from_pretrained(source, num_labels=labels)
    model = Qwen3ForSequenceClassification(config).float().eval()
    randomize(model, seed=1)
    model.save_pretrained(target)


def asked(text: str) -> Rollout:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}
    return Rollout(Prompt("row-1", "t", (message,)), text)


def test_the_score_is_the_models_for_question_and_answer_squashed(folder: Path) -> None:
    found = get("reward_model", {"path": str(folder)})(asked("<think>w9</think>w3 w4"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w0 w1 w2 <eos> w0 w3 w4 <eos>", return_tensors="pt").input_ids
    model: Any = Qwen3ForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        raw = model(ids).logits.item()
    assert isinstance(found, Score)
    assert found.details == {"score": pytest.approx(raw, rel=1e-4), "tokens": 8}
    assert found.value == pytest.approx(torch.tensor(raw).sigmoid().item(), rel=1e-4)


def test_unsquashed_scores_are_cut_off_at_zero_and_one(folder: Path) -> None:
    bound = get("reward_model", {"path": str(folder), "squash": "none"})
    found = [bound(asked(f"w{i}")) for i in range(20)]
    assert all(f.value == min(1.0, max(0.0, f.details["score"])) for f in found)
    assert len({f.details["score"] for f in found}) == 20


def test_a_long_chat_loses_its_beginning(folder: Path) -> None:
    bound = get("reward_model", {"path": str(folder), "max_length": 3})
    long, short = bound(asked("w5 " * 100 + "w6 w7")), bound(asked("w6 w7"))
    assert long.details == short.details
    assert long.details["tokens"] == 3  # w6 w7 <eos>


def test_an_answer_can_not_close_its_turn(folder: Path) -> None:
    bound = get("reward_model", {"path": str(folder)})
    assert bound(asked("w3 <eos> w0 w4")) == bound(asked("w3 w0 w4"))


def test_an_empty_answer_gets_nothing(folder: Path) -> None:
    assert get("reward_model", {"path": str(folder)})(asked("<think>w3")).value == 0.0


def test_a_folder_that_is_no_reward_model_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    def said(path: Path, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            _ = get("reward_model", {"path": str(path)}).scorer

    said(tmp_path / "absent", "no model folder")
    plain = tmp_path / "plain"
    make_text_model(plain, tied=True)
    said(plain, "has 2 labels")
    _save_classifier(folder, plain, labels=1)
    said(plain, "no chat template")
    headless = tmp_path / "headless"
    make_text_model(headless, tied=True)
    Qwen3Config.from_pretrained(headless, num_labels=1).save_pretrained(headless)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(headless)
    said(headless, "no weights for score")


# All of them


@pytest.mark.parametrize(
    ("target", "truth"),
    [("ocr", "Gleis 9 3/4"), ("ocr", ["color", "colour"]), ("ocr", 42), ("choice", "B"), ("choice", "(c)")],
)
def test_a_response_that_states_the_truth_scores_highest(target: str, truth: Any) -> None:
    declared = get(target).reward
    assert declared.truth_as_text
    assert score(target, declared.truth_as_text(truth), truth) == declared.highest


def test_a_response_that_states_the_text_of_the_true_option_scores_highest() -> None:
    assert [chosen(option, option, OPTIONS) for option in OPTIONS] == [1.0] * 4


MORE_HOSTILE = HOSTILE | {
    "letters": "(A) (B) " * (MEGABYTE // 8),
    "answer is": "the answer is " * (MEGABYTE // 14),
    "marked letters": "Answer: " + "A B " * 1000,
    "decorations": "Answer: " + "(" * 4000 + "B",
    "blanks after": "Answer: A" + " " * 4000 + "B" * 10,
    "fences": "```\n" * (MEGABYTE // 4),
    "open tags": "<think>" * (MEGABYTE // 7),
    "tag beginnings": "<think" * (MEGABYTE // 6),
    "tower": "9^9^9^9",
    "deep JSON": '{"a":' * (MEGABYTE // 5),
}


@pytest.mark.parametrize(("target", "truth"), [("ocr", "\u0141\u017b"), ("choice", "J"), ("format_tags", None)])
@pytest.mark.parametrize("text", MORE_HOSTILE.values(), ids=MORE_HOSTILE.keys())
def test_hostile_text_scores_nothing_soon(target: str, truth: Any, text: str) -> None:
    bound = get(target)
    start = time.process_time()
    assert bound(rollout(text, truth)).value == bound.reward.lowest
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("text", MORE_HOSTILE.values(), ids=MORE_HOSTILE.keys())
def test_the_reward_model_reads_no_more_of_hostile_text_than_its_room(folder: Path, text: str) -> None:
    bound = get("reward_model", {"path": str(folder), "max_length": 256})
    _ = bound.scorer
    start = time.process_time()
    found = bound(asked(text))
    assert 0.0 <= found.value <= 1.0
    assert found.details.get("tokens", 0) <= 256
    assert time.process_time() - start < 5.0
