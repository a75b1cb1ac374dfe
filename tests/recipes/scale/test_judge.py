"""Tests the scale model's judge: its training pairs, prompts and verdicts, and the quality of the shipped judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from recipes.scale import judge, tokenizer, world
from recipes.scale.judge import Correctness, Pair, correctness, verdict, verdict_json
from recipes.scale.practice import LONGEST, Prompter
from recipes.scale.world import Scene, Thing
from rewards.genrm import Comparison
from rl.model import hf_folder
from rl.model.config import register

SHIPPED = Path(judge.__file__).parent / "judge"
AGREES = 0.85  # the judge must agree with at least this share of held-out preferences, in both orders of responses
MEGABYTE = 1 << 20
CROWD = Scene((255, 255, 255), (Thing("red", "ring", 20, 20, 10), Thing("blue", "cross", 60, 60, 10)))


@pytest.mark.parametrize(
    ("response", "right", "of"),
    [
        ("top left red ring, middle blue cross", 2, 2),
        ("middle blue cross", 1, 2),
        ("top left red ring, middle blue ring", 1, 2),
        ("top left red ring, top left red ring, middle blue cross", 2, 3),  # a repeated thing counts as right only once
        ("top left red ring, middle blue cross, right red ring, left red ring", 2, 4),
        ("[0.50, 0.25]", 0, 2),
    ],
)
def test_the_grade_of_a_description_is_the_share_of_right_things(response: str, right: int, of: int) -> None:
    assert correctness(response, CROWD) == Correctness(right, of)
    assert Correctness(right, of).grade == round(10 * right / of)


def test_a_verdict_compares_thing_by_thing_and_counts_before_it_grades() -> None:
    said = verdict(Pair(CROWD, "middle blue ring, [0.50, 0.25]", "top left red ring, middle blue cross"))
    assert said.reasoning == (
        "top left red ring A no B red ring yes, middle blue cross A blue ring no B blue cross yes. A 0 of 3, B 2 of 2"
    )
    assert (said.grade_a, said.grade_b) == (0, 10)
    assert Comparison.model_validate_json(verdict_json(said)) == said and " :" not in verdict_json(said)


def test_preferences_have_heldout_pictures_and_the_first_response_is_better() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        pair = judge.draw_preference(rng, "heldout")
        assert pair.crowd.split == "heldout"
        assert correctness(pair.first, pair.crowd).grade > correctness(pair.second, pair.crowd).grade
        assert pair.swapped.swapped == pair


def test_the_first_and_the_second_response_are_better_equally_often() -> None:
    rng = np.random.default_rng(1)
    leads = [verdict(judge.draw_pair(rng, "train")) for _ in range(1000)]
    first, second = (
        sum(wins) for wins in zip(*((v.grade_a > v.grade_b, v.grade_b > v.grade_a) for v in leads), strict=True)
    )
    assert first + second > 600 and abs(first - second) < 100


def test_most_things_in_a_guess_are_wrong_so_the_judge_must_read_it() -> None:
    rng = np.random.default_rng(1)
    verdicts = [verdict(judge.draw_guesses(rng, "train")) for _ in range(200)]
    said = " ".join(one.reasoning for one in verdicts)
    assert 0.25 < said.count(" yes") / (said.count(" yes") + said.count(" no")) < 0.35


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    """The judge's tokenizer."""
    register()
    folder = tmp_path_factory.mktemp("judge")
    tokenizer.save(folder, judge.vocabulary())
    (folder / "config.json").write_text((judge.START / "config.json").read_text())
    return AutoTokenizer.from_pretrained(folder)


def test_prompt_and_verdict_fit_into_the_judges_length_in_the_profile(words) -> None:
    prompter, rng = Prompter(words, 16), np.random.default_rng(0)
    for _ in range(50):
        pair = judge.draw_pair(rng, "train")
        assert len(prompter.prompt(judge.problem_of(pair))) < 600
        assert len(prompter.response(verdict_json(verdict(pair)))) < LONGEST


def test_the_judge_starts_with_the_weights_of_the_scale_model(words) -> None:
    start, model = hf_folder.load(judge.START), judge.with_new_tokens(judge.START, words)
    theirs: Any = AutoTokenizer.from_pretrained(judge.START)
    before = theirs.get_vocab()
    for name, parameter in model.named_parameters():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(parameter, start.get_parameter(name)), name
    for token in ("red", "7", "<|im_end|>"):
        old = start.get_parameter("model.embed_tokens.weight")[before[token]]
        assert torch.equal(model.model.embed_tokens.weight[words.get_vocab()[token]], old)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Prompter]:
    """Returns the shipped judge, and a Prompter for it."""
    register()
    model: Any = hf_folder.load(SHIPPED)
    return model, Prompter(AutoTokenizer.from_pretrained(SHIPPED), model.config.image_token_len)


@pytest.mark.slow
def test_the_shipped_judge_is_small_and_agrees_with_heldout_preferences_in_either_order(shipped) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 10 * MEGABYTE
    report = json.loads((SHIPPED.parent / "judge_report.json").read_text())
    assert report["better shown first"] >= AGREES and report["better shown second"] >= AGREES
    model, prompter = shipped
    seen = judge.report(model, prompter, 32, seed=1)  # the shipped report was made with another seed
    assert min(seen["better shown first"], seen["better shown second"]) >= AGREES - 0.1, seen
    assert seen["no verdict"] <= 0.05


@pytest.mark.slow
def test_a_perfect_description_of_another_picture_does_not_win_with_the_shipped_judge(shipped) -> None:
    rng = np.random.default_rng(3)
    crowds = [world.draw_crowd(rng, "heldout", world.OPEN_CROWD) for _ in range(16)]
    others = [", ".join(thing.described for thing in crowd.things) for crowd in crowds[1:] + crowds[:1]]
    pairs = [Pair(crowd, said, world.teachers_words(crowd, rng)) for crowd, said in zip(crowds, others, strict=True)]
    model, prompter = shipped
    first = judge.grades(model, prompter, pairs)
    second = judge.grades(model, prompter, [pair.swapped for pair in pairs])
    leads = [a[0] - a[1] + b[1] - b[0] for a, b in zip(first, second, strict=True) if a and b]
    assert len(leads) >= 14 and np.mean([lead > 0 for lead in leads]) < 0.1


@pytest.mark.slow
def test_the_script_writes_a_judge_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["judge", "--out", str(tmp_path), "--steps", "2", "--every", "2", "--heldout", "2"]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.setattr(judge, "BATCH", 2)
    judge.main()
    hf_folder.load(tmp_path / "model")
    assert set(json.loads((tmp_path / "report.json").read_text())) >= {"better shown first", "no verdict"}


def test_teachers_descriptions_are_good_but_can_be_beaten() -> None:
    rng = np.random.default_rng(2)
    crowds = [world.draw_crowd(rng, "train", world.OPEN_CROWD) for _ in range(200)]
    grades = [correctness(world.teachers_words(crowd, rng), crowd).grade for crowd in crowds]
    assert 8 < np.mean(grades) < 9.5 and np.mean([grade < 10 for grade in grades]) > 0.6
