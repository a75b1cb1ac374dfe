"""Tests the scale model's pictures, problems, demonstrations and tokenizer."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from recipes.scale import practice, tokenizer, world
from recipes.scale.practice import Prompter
from recipes.scale.warm_start import score
from recipes.scale.world import Problem, Scene, Thing
from recipes.scale.writers import EXACT, ROUGH, ROUGH_OPENING, Writer, compare, final, usual_lines, without_carrying
from rl.recipe.layers import SHIPPED
from rl.recipe.resolve import load
from tests.support.data_rows import read_rows

SPLITS: tuple[world.Split, ...] = ("train", "heldout")
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def heldout() -> list[Problem]:
    return world.problems("heldout", world.SEEDS["heldout"], world.SIZES["heldout"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for split in SPLITS:
        world.write(folder, split)
    return folder


def shipped(split: world.Split) -> list[dict]:
    return [json.loads(line) for line in (world.SHIPPED / f"{split}.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").iterdir())


@pytest.mark.parametrize("name", ["train", "heldout", "open-train", "open-heldout"])
def test_the_generator_reproduces_the_shipped_rows(name: str, written: Path) -> None:
    assert (written / f"{name}.jsonl").read_bytes() == (world.SHIPPED / f"{name}.jsonl").read_bytes()


def test_the_generator_reproduces_the_shipped_pictures(written: Path) -> None:
    assert pictures(written) == pictures(world.SHIPPED)
    for name in pictures(written):  # pixels are compared, because PNG files may differ between zlib versions
        with Image.open(written / "pictures" / name) as new, Image.open(world.SHIPPED / "pictures" / name) as old:
            assert np.array_equal(np.asarray(new.convert("RGB")), np.asarray(old.convert("RGB"))), name


@pytest.mark.parametrize("split", SPLITS)
def test_the_reader_accepts_the_shipped_rows(split: world.Split) -> None:
    prompts = read_rows(world.SHIPPED / f"{split}.jsonl", reserved=tokenizer.SPECIAL, tasks=world.TASKS)
    assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(world.TASKS, world.SIZES[split])
    assert all(len(prompt.images) == (prompt.task not in ("arithmetic", "worksheet")) for prompt in prompts)


@pytest.mark.parametrize("split", SPLITS)
def test_open_questions_have_a_teachers_answer_and_no_ground_truth(split: world.Split) -> None:
    prompts = read_rows(world.SHIPPED / f"open-{split}.jsonl", reserved=tokenizer.SPECIAL, tasks=["describing"])
    assert len(prompts) == world.SIZES[split]
    assert all(prompt.reference and prompt.ground_truth is None and len(prompt.images) == 1 for prompt in prompts)


def test_the_teachers_description_is_right_except_for_one_shape() -> None:
    rng = np.random.default_rng(0)
    crowds = [world.draw_crowd(rng, "train", world.OPEN_CROWD) for _ in range(200)]
    assert {len(crowd.things) for crowd in crowds} == {5, 6, 7, 8}
    slips = []
    for crowd in crowds:
        said = world.teachers_words(crowd, rng).split(", ")
        wrong = [(s, t) for s, t in zip(said, crowd.things, strict=True) if s != t.described]
        assert all(s.rpartition(" ")[0] == t.described.rpartition(" ")[0] for s, t in wrong)
        slips.append(len(wrong))
    # The description gives one thing a random shape out of 4 shapes. This shape is wrong in 3 of 4 cases, so a
    # description has 0.75 wrong things on average.
    assert max(slips) == 1 and 0.6 < fmean(slips) < 0.9


def test_there_are_256_heldout_problems_of_each_task() -> None:
    assert Counter(row["task"] for row in shipped("heldout")) == dict.fromkeys(world.TASKS, 256)


def test_train_and_heldout_share_no_picture_and_no_sum() -> None:
    digests = {
        name: hashlib.sha256((world.SHIPPED / "pictures" / name).read_bytes()) for name in pictures(world.SHIPPED)
    }
    seen = {s: {d.digest() for name, d in digests.items() if name.removeprefix("open-").startswith(s)} for s in SPLITS}
    assert seen["train"] and seen["heldout"] and not seen["train"] & seen["heldout"]
    for task in ("arithmetic", "worksheet"):
        sums = {s: {r["messages"][0]["content"] for r in shipped(s) if r["task"] == task} for s in SPLITS}
        assert len(sums["heldout"]) == world.SIZES["heldout"] and not sums["train"] & sums["heldout"]


def test_no_seed_draws_a_heldout_problem_for_training(heldout: list[Problem]) -> None:
    sums = {p.question for p in heldout if p.task == "arithmetic"}
    drawn = world.problems("train", seed=world.SEEDS["heldout"], per_task=256)
    assert not sums & {p.question for p in drawn}
    assert all(p.scene.split == "train" for p in drawn if p.scene)


def test_the_same_seed_gives_the_same_problems_and_another_seed_different_problems() -> None:
    first, again, other = (world.problems("train", seed, 8) for seed in (5, 5, 6))
    assert first == again
    assert not {p.question for p in first if p.task == "arithmetic"} & {p.question for p in other}


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_box_touches_its_shape_on_all_four_sides(shape: str) -> None:
    scene = Scene((255, 255, 255), (Thing("red", shape, x=40, y=60, half=12),))
    rows, columns = np.nonzero(scene.pixels)
    # The box goes from x = 40 - 12 = 28 to x = 40 + 12 = 52, and from y = 48 to y = 72. The last column of the shape is
    # 51 and its last row is 71, because column 52 and row 72 are outside the box.
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (28, 48, 51, 71)
    assert scene.things[0].box == (28 / 112, 48 / 112, 52 / 112, 72 / 112)


def test_a_described_thing_is_the_only_one_of_its_kind_in_the_picture(heldout: list[Problem]) -> None:
    for problem in heldout:
        if problem.task in ("pointing", "grounding") and problem.scene:
            assert [t.name for t in problem.scene.things].count(problem.targets[0].name) == 1


def test_counting_is_by_colour_and_ignores_the_shape(heldout: list[Problem]) -> None:
    for problem in heldout:
        if problem.task == "counting" and problem.scene:
            colors = [thing.color for thing in problem.scene.things]
            assert problem.truth == str(colors.count(problem.targets[0].color))


def test_a_constant_count_is_right_in_at_most_four_of_ten_problems(heldout: list[Problem]) -> None:
    counts = Counter(problem.truth for problem in heldout if problem.task == "counting")
    assert max(counts.values()) <= 0.4 * counts.total()


def test_counting_goes_through_the_things_one_by_one() -> None:
    things = (Thing("red", "ring", 20, 20, 10), Thing("blue", "cross", 60, 60, 10), Thing("red", "cross", 90, 90, 10))
    problem = next(world.count_colors(Scene((255, 255, 255), things)))
    assert problem.question == "How many red things?"
    steps = "top left red 1, middle blue, bottom right red 2"
    assert EXACT(problem, np.random.default_rng(0)) == f"<think>one by one</think>{steps}, \\boxed{{2}}"


def test_the_exact_writer_is_nearly_always_right_except_on_worksheets(heldout: list[Problem]) -> None:
    for task in set(world.TASKS) - {"worksheet"}:  # the score is below 1: box coordinates are rounded to 2 decimals
        assert mean_score(heldout, task, EXACT) > 0.9, task


def mean_score(problems: list[Problem], task: str, writer: Writer) -> float:
    rng = np.random.default_rng(0)
    return fmean(score(p, writer(p, rng)) for p in problems if p.task == task)


def test_the_rough_writer_is_right_often_enough_to_learn_from(heldout: list[Problem]) -> None:
    for task in set(world.TASKS) - {"worksheet"}:
        assert 0.3 < mean_score(heldout, task, ROUGH) < 0.6, task


def test_one_answer_to_a_worksheet_is_rarely_right_but_many_answers_compared_mostly_are(heldout: list[Problem]) -> None:
    rng = np.random.default_rng(0)
    assert 0.2 < mean_score(heldout, "worksheet", EXACT) < 0.4
    sheets = [p for p in heldout if p.task == "worksheet"][:100]
    shown = [replace(p, messages=tuple(final(EXACT(p, rng)) for _ in range(16))) for p in sheets]
    assert fmean(score(p, compare(p, rng)) for p in shown) > 0.9


def test_all_lines_of_a_worksheet_except_one_are_worked_out_and_one_is_guessed() -> None:
    lines = ((47, 38), (12, 21), (36, 27), (53, 19))
    problem = Problem("worksheet", "What is left of ...?", "p=1, q=0, r=0, s=0", lines=lines)
    worked = {"p 7+8=15 4+3+1=8 85 1", "q 2+1=3 1+2=3 33 0", "r 6+7=13 3+2+1=6 63 0", "s 3+9=12 5+1+1=7 72 0"}
    answers = set()
    for seed in range(20):
        thinking, answer = EXACT(problem, np.random.default_rng(seed)).split("</think>")
        steps = thinking.removeprefix("<think>").split(", ")
        assert len(steps) == 3 and set(steps) < worked
        worked_out_p = any(step.startswith("p") for step in steps)
        assert answer == f"\\boxed{{p={int(worked_out_p)}, q=0, r=0, s=0}}"
        answers.add(answer)
    assert len(answers) == 2


def test_answers_to_worksheets_are_compared_line_by_line() -> None:
    votes = ("p=1, q=2, r=0, s=1", "p=2, q=2, r=1, s=0", "p=1, q=0, r=1, s=0")
    assert usual_lines(votes) == ["1", "2", "1", "0"]


def test_all_guesses_for_a_worksheets_line_are_right_equally_often(heldout: list[Problem]) -> None:
    lines = [terms for problem in heldout for terms in problem.lines]
    assert len(lines) == 4 * world.SIZES["heldout"] and all(9 < sum(terms) < 100 for terms in lines)
    shares = Counter(world.remainder(terms) for terms in lines)
    assert all(abs(shares[left] / len(lines) - 1 / 3) < 0.05 for left in range(3))


def test_a_worksheet_with_its_exact_answer_fits_into_the_cpu_profiles_sequence(words) -> None:
    longest = load(SHIPPED / "rlvr.yaml", profile="cpu").config.max_sequence_length
    prompter, rng = Prompter(words, 16), np.random.default_rng(0)
    for _ in range(100):
        sheet = world.draw_worksheet(rng, "train")
        assert len(prompter.prompt(sheet)) + len(prompter.response(EXACT(sheet, rng))) <= longest


def test_descriptions_name_the_things_in_reading_order() -> None:
    # `describe` does not sort the things. So this test lists its things in reading order, as in every crowd.
    things = (Thing("blue", "cross", 60, 20, 10), Thing("red", "ring", 90, 90, 10))
    problem = world.describe(Scene((255, 255, 255), things))
    rng = np.random.default_rng(0)
    assert EXACT(problem, rng) == "<think>one by one</think>top blue cross, bottom right red ring"
    assert " blue " in ROUGH(problem, rng) and " red " in ROUGH(problem, rng)


def test_the_responses_of_both_writers_begin_differently(heldout: list[Problem]) -> None:
    rng = np.random.default_rng(0)
    described = [world.describe(problem.scene) for problem in heldout if problem.task == "counting" and problem.scene]
    for problem in heldout + described:
        assert ROUGH(problem, rng).startswith(ROUGH_OPENING)
        assert not EXACT(problem, rng).startswith(ROUGH_OPENING)


def test_answers_to_sums_repeat_the_steps_after_the_thinking() -> None:
    problem = Problem("arithmetic", "What is 27 + 15 - 8?", "34", terms=(27, 15, -8))
    thinking, answer = EXACT(problem, np.random.default_rng(0)).split("</think>")
    assert thinking == "<think>first 27+15=42, then 42-8=34"
    assert answer == "27+15-8=42-8=\\boxed{34}"


@pytest.mark.parametrize(
    ("left", "right", "guess"),
    # The rough writer computes each digit separately and forgets the carry. In 27 + 15, the ones are 7 + 5 = 12, so the
    # last digit is 2. In 42 - 8, the ones differ by |2 - 8| = 6, so the last digit is 6. In 85 + 20, the tens are
    # 8 + 2 = 10, so the first digit is 0.
    [(12, 35, 47), (27, 15, 32), (42, -8, 46), (85, 20, 5)],
)
def test_the_rough_writer_forgets_to_carry(left: int, right: int, guess: int) -> None:
    assert without_carrying(left, right) == guess


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "Point at the red ring.",
        "How many purple things?",
        "<think>maybe top left</think>[0.17, 0.50]",
        "10.5 is not 0.5\n\tnor  .5",
        "héllo wörld, 你好 👍 a\u0301 \x00 <tool_call>{}",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(text: str, words) -> None:
    ids = words(text, add_special_tokens=False).input_ids
    assert words.decode(ids, skip_special_tokens=True) == text


def test_demonstrations_are_short_and_survive_the_tokenizer(heldout: list[Problem], words) -> None:
    rng = np.random.default_rng(0)
    for problem in heldout:
        for text in (EXACT(problem, rng), ROUGH(problem, rng)):
            ids = words(text).input_ids
            assert len(ids) < practice.LONGEST and words.decode(ids) == text


def test_a_coordinate_is_three_tokens(words) -> None:
    assert words.tokenize("[0.37, 0.52]") == ["[", "0.", "3", "7", ",Ġ", "0.", "5", "2", "]"]


def test_the_chat_template_has_one_image_token_per_picture(words) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Box the red ring."}]
    text = words.apply_chat_template(
        [{"role": "system", "content": "Be exact."}, {"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe exact.<|im_end|>\n"
        "<|im_start|>user\n<im_patch>Box the red ring.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_think_tags_are_single_tokens_that_decoding_keeps(words) -> None:
    ids = words("<think>maybe</think>4<|im_end|>").input_ids
    assert len(ids) == 5 and words.decode(ids, skip_special_tokens=True) == "<think>maybe</think>4"


def test_shipped_policy_and_data_are_below_ten_megabytes() -> None:
    folder, other = world.SHIPPED.parent, {"__pycache__", "judge"}
    files = (path for path in folder.rglob("*") if path.is_file() and not other & {*path.relative_to(folder).parts})
    assert 5 * MEGABYTE < sum(path.stat().st_size for path in files) < 10 * MEGABYTE
