"""Helpers for tests of rewards: rollouts, pictures, hostile texts, and checks that many tests share."""

import io
import time
from typing import Any

from PIL import Image

from rewards import get
from rl.types import Picture, Prompt, Rollout

MEGABYTE = 1 << 20
HOSTILE = {
    "empty": "",
    "open braces": "\\boxed{" * (MEGABYTE // 7),
    "close braces": "}" * MEGABYTE,
    "nested lists": "[" * MEGABYTE,
    "digits": "1" * MEGABYTE,
    "digits and commas": "[" + "1," * (MEGABYTE // 2),
    "blanks": "[" + " " * MEGABYTE + "1",
    "answers": "answer:" * (MEGABYTE // 7),
    "null bytes": "\0" * MEGABYTE,
    "right to left": "\u202e\u200f" * (MEGABYTE // 2),
    "ligatures": "\ufdfa" * MEGABYTE,
    "unbalanced tags": "<box><point>" * (MEGABYTE // 12),
    "nan box": "[nan, inf, -inf, 1e999999]",
    "nan point": "[nan, inf]",
    "think": "</think>" * (MEGABYTE // 8),
}
HOSTILE_SHAPES = HOSTILE | {
    "many boxes": "[" + "[0, 0, 0.9, 0.9]," * 100_000 + "]",
    "many points": "(0.9,0.9) " * 100_000,
    "many bad boxes": "[nan,0,1,1]" * 100_000,
    "deep JSON": '{"box":' * (MEGABYTE // 7) + "1",
    "half a box": "[0.1,0.2,0.3 " * (MEGABYTE // 13),
    "names": "x1=1 y1=1 x2=1 " * (MEGABYTE // 15),
    "quotes": "[0,0,1,1]" + '"' * 200 + "[0,0," + "'\"" * (MEGABYTE // 2),
    "tower": "9^9^9^9",
    "exponents": "[1e999999,1e-999999]" * 50_000,
    "actions": "action:" * (MEGABYTE // 7) + "Xdone(",
    "spelled": "twenty-" * (MEGABYTE // 7),
    "marked digits": "Answer: " + "1" * 4000,
}
HOSTILE_TEXTS = HOSTILE | {
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


def rollout(text: str, truth: Any, images: tuple[Picture, ...] = (), task: str = "t") -> Rollout:
    return Rollout(Prompt("row-1", task, (), images, ground_truth=truth), text)


def score(target: str, text: str, truth: Any, **params: Any) -> float:
    return float(get(target, params)(rollout(text, truth)).value)


def picture(width: int, height: int) -> Picture:
    png = io.BytesIO()
    Image.new("RGB", (width, height)).save(png, "PNG")
    return Picture.of(png.getvalue())


def assert_lowest_soon(target: str, truth: Any, text: str) -> None:
    """Asserts that `text` gets the lowest value of the reward. The scoring may take two seconds of CPU time."""
    bound = get(target)
    _ = bound.scorer
    start = time.process_time()
    assert bound(rollout(text, truth)).value == bound.reward.lowest
    assert time.process_time() - start < 2.0


def assert_truth_scores_highest(target: str, truth: Any) -> None:
    """Writes the ground truth as text, and asserts that this text as a response gets the highest value."""
    declared = get(target).reward
    assert declared.truth_as_text
    assert score(target, declared.truth_as_text(truth), truth) == declared.highest
