"""Tests that the answer is found in a response, whatever its mark."""

# ruff: noqa: RUF001  # punctuation of several scripts

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import get
from rewards.answer import bare, bold, find, last_boxed, last_line, marked_answer
from rl.types import Prompt, Rollout
from tests.support.reward_samples import HOSTILE_TEXTS

CASES = Path(__file__).with_name("answer_cases.jsonl")


@pytest.mark.parametrize(
    ("text", "answer", "mark"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}", "box"),
        (r"So \fbox{5}.", "5", "box"),
        (r"\boxed{\text{Blue}}", "Blue", "box"),
        ("<answer> 5 </answer>", "5", "tag"),
        ("<ANSWER>5", "5", "tag"),
        ("24 + 24 = 48\n#### 48", "48", "hashes"),
        ("**Answer:** 5", "5", "label"),
        ("**Answer: 5**", "5", "label"),
        ("Answer (in cm): 5", "5", "label"),
        ("### Final Answer\n\n5", "5", "label"),
        ("答案：42", "42", "label"),
        ("【答案】42", "42", "label"),
        ("최종 답: 42", "42", "label"),
        ("Réponse finale : 42", "42", "label"),
        ("The answer is 42.\nThis follows from above.", "42.", "phrase"),
        ("So the correct option is (C).", "(C).", "phrase"),
        ("所以正确答案是C。", "C", "phrase"),
        ("故选C。", "C", "phrase"),
        ("Die richtige Antwort lautet: Paris", "Paris", "phrase"),
        ("La respuesta es: París", "París", "phrase"),
        ("答えは42です。", "42", "phrase"),
        ("정답은 42입니다.", "42", "phrase"),
        ("It is 42.", "It is 42.", None),
    ],
)
def test_every_mark_is_found_and_decoration_is_removed(text: str, answer: str, mark: str | None) -> None:
    found = find(text)
    assert found and (found.text, found.mark) == (answer, mark)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{3} Wait. Answer: 5", "5"),
        (r"Answer: 3. No, \boxed{5}", "5"),
        (r"<answer>3</answer> or rather \boxed{5}", "5"),
        (r"\boxed{3} <answer>5</answer>", "5"),
        ("#### 3\nAnswer: 5", "5"),
        ("Answer: 3\n#### 5", "5"),
        (r"\boxed{3}, so the answer is 5", "5"),
        ("The answer is 3. The answer is 5", "5"),
    ],
)
def test_the_last_mark_counts_whatever_its_kind(text: str, answer: str) -> None:
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<answer>The result: \boxed{5}</answer>", "5"),
        ("Answer: The correct option is (C)", "(C)"),
        ("<answer>Answer: 5</answer>", "5"),
        (r"\boxed{5} The answer is consistent with the estimate.", "5"),
        (r"\boxed{5} The wrong answer is 6.", "5"),
        ("Answer: B\n\nThe most common wrong answer is A.", "B\n\nThe most common wrong answer is A."),
    ],
)
def test_a_mark_inside_a_mark_is_opened_and_a_sentence_about_the_answer_is_none(text: str, answer: str) -> None:
    assert marked_answer(text) == answer


@pytest.mark.parametrize("text", ["#### Step 2\nWe add.", "Options: A, B", "a selected option", "选项A错误"])
def test_headings_and_words_that_look_like_marks_are_none(text: str) -> None:
    found = find(text)
    assert found and found.mark is None


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a} } {", "a"),
        (r"{ \boxed {a}", "a"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("no box", None),
    ],
)
def test_the_last_box_that_closes_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


def test_bold_text_and_the_last_line_are_found() -> None:
    assert bold("**Step 1**: we add. It is **5**, as shown.") == "5"
    assert bold("**Note:** none") is None
    assert bold("none") is None
    assert last_line("first\n\n**second**\n") == "second"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("**5**", "5"),
        ("$5$", "5"),
        (r"\(5\)", "5"),
        (r"\text{5}", "5"),
        ("5**", "5"),
        ("`$5$`", "5"),
        ("$1$ or $2$", "$1$ or $2$"),
    ],
)
def test_decoration_around_the_whole_text_is_removed(text: str, plain: str) -> None:
    assert bare(text) == plain


def test_a_long_response_without_a_mark_at_its_end_has_no_answer() -> None:
    assert find("x" * 5000) is None
    assert find("Answer: 5" + "x" * 5000) is None


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_texts_are_searched_without_an_error(text: str) -> None:
    find(text, 1 << 16)


def cases() -> dict[str, list[dict[str, Any]]]:
    """The cases of answer_cases.jsonl, which are answers as models write them, by reward."""
    by_reward = defaultdict(list)
    for line in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        by_reward[case["reward"]].append(case)
    return by_reward


@pytest.mark.parametrize(("reward", "rows"), cases().items(), ids=cases().keys())
def test_answers_as_models_write_them_score_as_a_person_would(reward: str, rows: list[dict[str, Any]]) -> None:
    wrong = []
    for row in rows:
        prompt = Prompt(row["id"], "t", (), ground_truth=row.get("ground_truth"), meta=row.get("meta", {}))
        value = get(reward, row.get("params", {}))(Rollout(prompt, row["response"])).value
        low, high = row["expected"] if isinstance(row["expected"], list) else (row["expected"], row["expected"])
        if not low - 1e-6 <= value <= high + 1e-6:
            wrong.append((row["id"], row["response"], row["expected"], value))
    assert not wrong


PIECES = st.sampled_from(
    [
        *(
            "\\boxed{",
            "\\fbox{",
            "\\text{",
            "\\frac{",
            "}",
            "<answer>",
            "</answer>",
            "#### ",
            "**",
            "$",
            "\n",
            "Answer: ",
        ),
        *(
            "答案：",
            "The answer is ",
            "故选",
            "A",
            "B",
            "I",
            "(",
            ")",
            "[",
            "]",
            "5",
            "0.5",
            "1e-19",
            "10-15",
            "，",
            "个",
        ),
        *("cm", "m/s^2", "%", "≈", "\\ldots", ",", " and ", " or ", "twenty", "五", "in total ", "click(", "action: "),
        *("point:1,2", "\\", "{", "^", "_", "=", "-"),
    ]
)
TRUTHS: dict[str, Any] = {
    "choice": "B",
    "count": 5,
    "exact": "Paris",
    "ocr": "Exit 5",
    "iou": [0.1, 0.1, 0.5, 0.5],
    "point_distance": [0.5, 0.5],
    "gui_click": {"box": [0.1, 0.1, 0.5, 0.5]},
    "math_verify": "5 cm",
}


@pytest.mark.parametrize(("reward", "truth"), TRUTHS.items(), ids=TRUTHS.keys())
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_no_answer_makes_a_reward_fail(reward: str, truth: Any, text: str) -> None:
    bound = get(reward)
    value = bound(Rollout(Prompt("row-1", "t", (), ground_truth=truth), text)).value
    assert bound.reward.lowest <= value <= bound.reward.highest
