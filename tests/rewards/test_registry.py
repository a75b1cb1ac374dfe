"""The registry and the built-in rewards, called directly on small answers."""

import asyncio
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rewards import Invalid, Rollout, Score, get, names
from rewards.text import last_boxed, normalised
from rl.types import Picture, Prompt

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


def rollout(text: str, truth: Any, images: tuple[Picture, ...] = (), task: str = "t") -> Rollout:
    return Rollout(Prompt("row-1", task, (), images, ground_truth=truth), text)


def score(target: str, text: str, truth: Any, **params: Any) -> float:
    return float(get(target, params)(rollout(text, truth)).value)


def picture(width: int, height: int) -> Picture:
    png = io.BytesIO()
    Image.new("RGB", (width, height)).save(png, "PNG")
    return Picture.of(png.getvalue())


# The registry


def test_adding_a_file_to_the_package_is_all_it_takes_to_be_found() -> None:
    assert {"exact", "iou", "math_verify", "point_distance"} <= set(names())


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names() -> None:
    with pytest.raises(ValueError, match=r"'exakt' \(did you mean 'exact'\?\); there are: (\w+, )*exact, (\w+, )*iou"):
        get("exakt")


def test_an_unknown_parameter_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no parameter 'pover' \(did you mean 'power'\?\)"):
        get("iou", {"pover": 2})


def test_the_rollout_is_no_parameter() -> None:
    with pytest.raises(ValueError, match="no parameter 'rollout'"):
        get("exact", {"rollout": 1})


@pytest.mark.parametrize(
    ("params", "named"),
    [({"power": "wide"}, "power is 'wide'"), ({"power": 0}, "power is 0"), ({"coordinates": "px"}, "'px'")],
)
def test_a_parameter_of_the_wrong_type_or_range_is_named(params: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        get("iou", params)


def plugin(folder: Path, body: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(f"from rewards import Invalid, Rollout, Score, reward\n\n{body}")
    return path


TEN_LINES = """
@reward("right_and_short")
def right_and_short(rollout: Rollout, limit: int) -> float:
    right = rollout.answer == str(rollout.prompt.ground_truth)
    return float(right and len(rollout.text) < limit)
"""


def test_a_file_is_found_relative_to_the_recipe_and_its_missing_parameter_is_named(tmp_path: Path) -> None:
    plugin(tmp_path, TEN_LINES)
    bound = get("mine.py:right_and_short", {"limit": 5}, tmp_path)
    assert bound(rollout("42", 42)) == 1.0
    assert bound(rollout("<think>so</think>42", 42)) == 0.0
    with pytest.raises(ValueError, match="needs the parameter 'limit'"):
        get("mine.py:right_and_short", {}, tmp_path)


def test_a_file_is_also_found_by_module_and_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, TEN_LINES, "some_module.py")
    about = tmp_path / "some_plugin-1.0.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    about.joinpath("entry_points.txt").write_text("[rl.rewards]\nshort = some_module:right_and_short\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("some_module:right_and_short", "short"):
        assert get(target, {"limit": 5})(rollout("42", 42)) == 1.0
    assert "short" in names()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("absent.py:x", "there is no file"),
        ("mine.py:right_and_shirt", "did you mean 'right_and_short'"),
        ("mine.py:helper", "put @reward"),
        ("broken.py:x", "broken.py does not import: ZeroDivisionError"),
        ("no_such_module:x", "cannot import no_such_module"),
    ],
)
def test_a_target_that_is_not_there_says_what_is_wrong(tmp_path: Path, target: str, said: str) -> None:
    plugin(tmp_path, TEN_LINES + "\n\ndef helper(): ...\n")
    plugin(tmp_path, "1 / 0", "broken.py")
    with pytest.raises(ValueError, match=said):
        get(target, {}, tmp_path)


def test_two_files_may_use_one_name_but_then_it_does_not_find_them_alone(tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        plugin(tmp_path, TEN_LINES.replace("right_and_short", "shared_name"), name)
        assert get(f"{name}:shared_name", {"limit": 3}, tmp_path)(rollout("7", 7)) == 1.0
    with pytest.raises(ValueError, match="several rewards are called 'shared_name'"):
        get("shared_name")


def test_a_class_is_made_with_the_parameters_and_set_up_once(tmp_path: Path) -> None:
    body = """
from __future__ import annotations

@reward("counting")
class Counting:
    def __init__(self, start: int = 0):
        self.calls, self.setups = start, 0
    def setup(self):
        self.setups += 1
    async def __call__(self, rollout: Rollout) -> Score:
        self.calls += 1
        return Score(0.5, {"calls": self.calls, "setups": self.setups})
"""
    path = tmp_path / "classy.py"
    path.write_text(body.replace("\n@reward", "from rewards import Rollout, Score, reward\n\n@reward"))
    bound = get("classy.py:counting", {"start": "3"}, tmp_path)
    asyncio.run(bound(rollout("", 0)))
    assert asyncio.run(bound(rollout("", 0))) == Score(0.5, {"calls": 5, "setups": 1})


def test_the_registry_and_all_built_in_rewards_import_without_the_heavy_libraries() -> None:
    code = "import sys, rewards; rewards.names(); print({'torch', 'ray', 'vllm', 'sympy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# Reading answers


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


def test_normalising_forgets_case_blanks_a_period_and_invisible_marks() -> None:
    assert normalised(" The  Blue\nHouse. ") == normalised("the\u200f blue house") == "the blue house"
    assert normalised(r"\text{Blue}") == "blue"


@pytest.mark.parametrize("text", ["Paris", "paris.", "so it is.\nAnswer: Paris", r"\boxed{\text{Paris}}!"])
def test_exact_takes_the_box_else_what_follows_answer_else_everything(text: str) -> None:
    assert score("exact", text, "Paris") == 1.0


@pytest.mark.parametrize("text", ["It is Paris", "Answer: Paris or Rome", r"Paris \boxed{Rome}", ""])
def test_exact_gives_nothing_for_an_answer_that_only_contains_the_truth(text: str) -> None:
    assert score("exact", text, "Paris") == 0.0


def test_exact_is_not_fooled_by_blanks_that_push_a_wrong_answer_out_of_sight() -> None:
    assert score("exact", "Rome" + " " * 10_000 + "Paris", "Paris") == 0.0


def test_exact_compares_numbers_as_they_are_written() -> None:
    assert score("exact", "Answer: 7", 7) == 1.0


@pytest.mark.parametrize("truth", [None, "", " . ", ["a"]])
def test_exact_calls_a_row_without_a_usable_ground_truth_invalid(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("exact", "x", truth)


# Boxes


TRUE_BOX = [0.0, 0.0, 0.5, 1.0]


def test_iou_is_squared_by_default() -> None:
    # the answer covers the truth and as much again: IoU 1/2
    assert score("iou", "[0, 0, 1, 1]", TRUE_BOX) == 0.25
    assert score("iou", "[0, 0, 1, 1]", TRUE_BOX, power=1) == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "[0, 0, 0.5, 1]",
        "The box is (0.0, 0.0, .5, 1.).",
        '```json\n{"bbox_2d": [0, 0, 0.5, 1], "label": "cat"}\n```',
        '[{"box": [0, 0, 5e-1, 1]}]',
        "<box>0 0 0.5 1</box>",
        "<box>[0, 0, 0.5, 1]</box>",
        "<|box_start|>(0, 0), (0.5, 1)<|box_end|>",
        "[[0, 0, 0.5, 1]]",
        "first [0.1, 0.1, 0.2, 0.2], no, [0, 0, 0.5, 1]",
    ],
)
def test_iou_reads_the_usual_ways_to_write_a_box_and_takes_the_last(text: str) -> None:
    assert score("iou", text, TRUE_BOX) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left half",
        "[0, 0, 0.5]",
        "[0, 0, 0.5, 1, 1]",
        "[0.5, 1, 0, 0]",
        "[0, 0, nan, 1]",
        "[0, 0, inf, 1]",
        "[0, 0, 1e308, 1e308]",
        "[0, 0, 0.5, 1] or [nan, 0, 0.5, 1]",
        "<think>[0, 0, 0.5, 1]",
    ],
)
def test_iou_gives_nothing_for_what_is_no_box(text: str) -> None:
    assert score("iou", text, TRUE_BOX) == 0.0


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ([[0, 0, 1, 1], [0, 0, 0.5]], "takes \\[x1, y1, x2, y2\\]"),
        ([0, 0, 500, 1000], "set the reward's parameter coordinates"),
        ([0.5, 0, 0.5, 1], "is no box"),
        ([0, 0, float("nan"), 1], "takes \\[x1, y1, x2, y2\\]"),
        ([0, 0, 1], "takes \\[x1, y1, x2, y2\\]"),
        ("[0, 0, 1, 1]", "takes \\[x1, y1, x2, y2\\]"),
        (None, "takes \\[x1, y1, x2, y2\\]"),
    ],
)
def test_a_bad_true_box_is_a_fault_of_the_row(truth: Any, said: str) -> None:
    with pytest.raises(Invalid, match=said):
        score("iou", "[0, 0, 1, 1]", truth)


def test_boxes_may_be_thousandths_or_pixels_of_the_rows_picture() -> None:
    assert score("iou", "[0, 0, 1000, 1000]", [0, 0, 500, 1000], coordinates="thousand", power=1) == 0.5
    row = rollout("[0, 0, 40, 30]", [0, 0, 20, 30], (picture(40, 30),))
    assert get("iou", {"coordinates": "pixel", "power": 1})(row).value == 0.5
    with pytest.raises(Invalid, match="outside its picture"):
        get("iou", {"coordinates": "pixel"})(rollout("", [0, 0, 41, 30], (picture(40, 30),)))
    with pytest.raises(Invalid, match="row row-1 has none"):
        score("iou", "[0, 0, 1, 1]", [0, 0, 1, 1], coordinates="pixel")


# Points


def test_point_distance_is_one_at_the_target_and_falls_to_exactly_zero_at_the_radius() -> None:
    values = [score("point_distance", f"[{x}, 0.5]", [0.5, 0.5]) for x in (0.5, 0.51, 0.6, 0.69, 0.7, 0.9)]
    assert values[0] == 1.0
    assert values[2] == pytest.approx(0.5)  # 1 - 0.1 / 0.2
    assert values == sorted(values, reverse=True)
    assert values[3] > 0.0
    assert score("point_distance", "[1, 0.5]", [0.5, 0.5], radius=0.5) == 0.0
    assert values[5] == 0.0


@pytest.mark.parametrize(
    "text",
    ["(0.5, 0.25)", '{"point_2d": [0.5, 0.25]}', "<point>0.5 0.25</point>", "<point>(.5, .25)</point>"],
)
def test_point_distance_reads_the_usual_ways_to_write_a_point(text: str) -> None:
    assert score("point_distance", f"(0.9, 0.9), or rather {text}", [0.5, 0.25]) == 1.0


@pytest.mark.parametrize("text", ["", "0.5 0.5", "[0.5, 0.5, 0.5]", "[nan, 0.5]", "[0.5, 1e999]"])
def test_point_distance_gives_nothing_for_what_is_no_point(text: str) -> None:
    assert score("point_distance", text, [0.5, 0.5]) == 0.0


def test_pixel_distances_are_fractions_of_width_and_of_height() -> None:
    # 10 pixels right in a picture 100 wide is 0.1; 10 down in one 50 high is 0.2
    bound = get("point_distance", {"coordinates": "pixel", "radius": 0.4})
    right, down = (rollout(text, [50, 25], (picture(100, 50),)) for text in ("[60, 25]", "[50, 35]"))
    assert (bound(right).value, bound(down).value) == (pytest.approx(0.75), pytest.approx(0.5))


# Mathematics


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (r"<think>2?</think>So \(x = 3\), \boxed{\frac{1}{2}}.", "0.5"),
        (r"\boxed{0.5}", r"\frac{2}{4}"),
        (r"3 + 4 = 7" + "\nAnswer: 7", 7),
        (r"Answer: 2\sqrt{3}", r"\sqrt{12}"),
        (r"3\sqrt{13}", r"3\sqrt{13}"),
        (r"The result is $\frac{\pi}{2}$.", r"\boxed{\pi/2}"),
        (r"\boxed{(3, \pi)}", r"$\left( 3, \pi \right)$"),
        (r"\boxed{10:30 a.m.}", "10:30 A.M."),
        (r"\boxed{x=5}", "5"),
    ],
)
def test_math_verify_accepts_equal_mathematics(text: str, truth: Any) -> None:
    assert score("math_verify", text, truth) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        r"\boxed{}",
        r"\boxed{6}",
        r"5 \boxed{6}",
        r"\boxed{5, 6}",
        r"\boxed{\frac{5}{",
        r"\boxed{nan}",
    ],
)
def test_math_verify_gives_nothing_for_anything_else(text: str) -> None:
    assert score("math_verify", text, "5") == 0.0


@pytest.mark.parametrize("truth", ["", None, r"\frac{1}{", "}{", {"x": 1}])
def test_a_true_result_that_does_not_parse_is_a_fault_of_the_row(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-1"):
        score("math_verify", r"\boxed{5}", truth)


# All of them


@pytest.mark.parametrize(
    ("target", "truth"),
    [("exact", "5"), ("iou", TRUE_BOX), ("point_distance", [0.5, 0.5]), ("math_verify", "5")],
)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_megabytes_of_hostile_text_score_nothing_soon(target: str, truth: Any, text: str) -> None:
    bound = get(target)
    _ = bound.scorer
    start = time.process_time()
    assert bound(rollout(text, truth)).value == 0.0
    assert time.process_time() - start < 2.0
