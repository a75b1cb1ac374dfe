"""Tests the warm start of the scale model: its batches, its script, and the shipped model."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recipes.scale import practice, tokenizer, warm_start, world
from recipes.scale.practice import Demonstrations, Prompter
from recipes.scale.world import Problem, Scene, Thing
from recipes.scale.writers import EXACT, ROUGH
from rl.model import hf_folder
from rl.model.packed import embed
from rl.model.step_vl import StepVL

HERE = Path(warm_start.__file__).parent
SHIPPED = HERE / "model"
STEPS = warm_start.TrainingSteps(eyes=3, words=3, messages=2, seed=0)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    made: Any = AutoTokenizer.from_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def model(words) -> StepVL:
    return warm_start.new_model(words, seed=0)


@pytest.fixture(scope="module")
def prompter(words, model: StepVL) -> Prompter:
    return Prompter(words, model.config.image_token_len)


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["warm_start", *arguments])
    warm_start.main()


def test_a_batch_of_pictures_has_the_same_pixels_as_single_pictures(model: StepVL) -> None:
    rng = np.random.default_rng(0)
    scenes = [world.draw_scene(rng, "train"), world.draw_crowd(rng, "train")]
    alone = torch.stack([model.views(scene.image.convert("RGB")).global_view for scene in scenes])
    torch.testing.assert_close(practice.pixels(model, scenes), alone, atol=1e-5, rtol=0)


def test_a_picture_takes_sixteen_tokens_and_no_crops(model: StepVL) -> None:
    picture = world.draw_scene(np.random.default_rng(0), "train").image.convert("RGB")
    assert not model.views(picture).crops
    assert model.features([picture])[0].shape == (16, model.config.hidden_size)


def test_a_prompt_is_the_chat_template_with_image_tokens_for_the_picture(prompter: Prompter, words) -> None:
    scene = world.draw_scene(np.random.default_rng(0), "train")
    text = words.decode(prompter.prompt(Problem("pointing", "Point at the red ring.", [0, 0], scene)))
    slots = f"<im_start>{'<im_patch>' * 16}<im_end>"
    assert text == f"<|im_start|>user\n{slots}Point at the red ring.<|im_end|>\n<|im_start|>assistant\n"


def test_sharing_a_pictures_tokens_does_not_change_the_loss(model: StepVL, prompter: Prompter) -> None:
    rng = np.random.default_rng(0)
    problems = [*world.point_and_box(world.draw_scene(rng, "train", (2, 2))), world.draw_sum(rng, "train")]
    batch = Demonstrations(problems, [EXACT(problems[0], rng), *(ROUGH(p, rng) for p in problems[1:])])
    apart = [_summed_loss(model, prompter, p, r) for p, r in zip(problems, batch.responses, strict=True)]
    tokens = sum(len(prompter.response(r)) for r in batch.responses)
    torch.testing.assert_close(practice.loss(model, prompter, batch), torch.stack(apart).sum() / tokens)


def _summed_loss(model: StepVL, prompter: Prompter, problem: Problem, response: str) -> torch.Tensor:
    """Returns the sum of the cross-entropies of a response's tokens. The attention is plain causal attention."""
    prompt, ids = prompter.prompt(problem), prompter.response(response)
    row = torch.tensor(prompt + ids)
    shown = [practice.features(model, [problem.scene])[id(problem.scene)]] if problem.scene else []
    inputs = embed(model.model.embed_tokens, row, row == model.config.image_token_id, shown)
    model.model.set_attn_implementation("sdpa")
    hidden = model.model(inputs_embeds=inputs[None]).last_hidden_state[0]
    model.model.set_attn_implementation("packed_groups")
    return F.cross_entropy(model.lm_head(hidden[len(prompt) - 1 : -1]), row[len(prompt) :], reduction="sum")


def test_a_thing_is_seen_at_the_token_that_contains_its_centre() -> None:
    # The picture has 4 x 4 tokens. A token covers 28 x 28 pixels. Counted from 0, the point (40, 90) is in column 1 and
    # row 3. So the point belongs to token 3 * 4 + 1 = 13.
    seen = practice.sightings([Scene((255, 255, 255), (Thing("green", "cross", 40, 90, 12),))], grid=4)
    assert seen.seen.nonzero().tolist() == [[0, 13]]
    assert (int(seen.color[0, 13]), int(seen.form[0, 13])) == (1, 3)
    at, box = [40 / 112, 90 / 112], [28 / 112, 78 / 112, 52 / 112, 102 / 112]
    assert seen.places[0, 13].tolist() == pytest.approx(at + box, abs=0.01)


@pytest.mark.parametrize("stopped", [2, 4])  # step 2 trains the vision part, step 4 trains the decoder part
def test_an_interrupted_warm_start_ends_with_the_same_weights(tmp_path: Path, stopped: int) -> None:
    whole = warm_start.Trainer(tmp_path / "whole", STEPS)
    for _ in range(6):
        whole.train_step()
    first = warm_start.Trainer(tmp_path / "halves", STEPS)
    for _ in range(stopped):
        first.train_step()
    first.save_state()
    second = warm_start.Trainer(tmp_path / "halves", STEPS)
    assert second.step == stopped
    for _ in range(6 - stopped):
        second.train_step()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_a_warm_start_with_other_options_is_not_continued(tmp_path: Path) -> None:
    trainer = warm_start.Trainer(tmp_path, STEPS)
    trainer.train_step()
    trainer.save_state()
    with pytest.raises(SystemExit, match="was started with"):
        warm_start.Trainer(tmp_path, replace(STEPS, seed=1))


@pytest.mark.slow
def test_the_script_runs_and_writes_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(practice, "LONGEST", 8)  # tokens; an untrained model does not end its responses
    run(
        "--out",
        str(tmp_path),
        "--eyes",
        "2",
        "--messages",
        "2",
        "--steps",
        "2",
        "--save-every",
        "2",
        "--heldout",
        "1",
        monkeypatch=monkeypatch,
    )
    saved, state = hf_folder.load(tmp_path / "model"), load_file(tmp_path / "state.safetensors")
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, state[f"model.{name}"]), name
    assert set(json.loads((tmp_path / "report.json").read_text())) == set(world.TASKS)


def test_the_shipped_model_has_the_shapes_and_tokens_that_the_script_makes(words) -> None:
    shipped, made = hf_folder.load(SHIPPED), warm_start.new_model(words, seed=0)
    assert {n: p.shape for n, p in shipped.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    theirs: Any = AutoTokenizer.from_pretrained(SHIPPED)
    assert theirs.get_vocab() == words.get_vocab()


def test_the_shipped_model_has_the_template_for_messages() -> None:
    assert (SHIPPED / "pacore.jinja").read_text() == practice.TEMPLATE.read_text()


def test_the_shipped_model_answers_but_not_yet_well() -> None:
    """This test uses only 48 problems per task, so that it is quick. recipes/scale/report.json has the results of
    all 256 problems per task."""
    model, words = hf_folder.load(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    assert isinstance(model, StepVL)
    problems = world.problems("heldout", world.SEEDS["heldout"], per_task=48)
    table = warm_start.report(model, Prompter(words, model.config.image_token_len), problems)
    for task, row in table.items():
        low, high = warm_start.READY
        assert low - 0.1 < row["greedy"] < high + 0.1, (task, row)
    assert fmean(row["exact"] - row["rough"] for row in table.values()) > 0.1


def test_the_shipped_report_is_within_bounds_for_every_task() -> None:
    table = json.loads((HERE / "report.json").read_text())
    low, high = warm_start.READY
    assert all(low <= table[task]["greedy"] <= high for task in world.TASKS)
    assert all(table[task]["exact"] > table[task]["rough"] for task in world.TASKS)
