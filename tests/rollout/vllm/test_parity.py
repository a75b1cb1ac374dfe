"""Tests that learner and engine compute the same logprobs within 1e-4 nats per token, in float32 and with pictures."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl.learner.batch import Group
from rl.learner.packing import pack
from rl.model.config import StepVLConfig
from rl.model.layout import picture_tokens
from rl.model.packed import PolicyModel
from rl.model.pictures import views
from rl.model.step_vl import StepVL
from rl.types import Completion, Picture, Request
from rollout.vllm.engine import Engine
from tests.conftest import Served
from tests.support import tiny

WIDE_CROP = (168, 90)  # the picture has one crop, which is higher than the picture
SHOWN = {
    "text only": [],
    "one picture": [tiny.NO_CROP],
    "one crop": [tiny.ONE_CROP],
    "crop beyond the picture": [WIDE_CROP],
    "several crops": [tiny.FOUR_CROPS],
    "several pictures": [tiny.NO_CROP, tiny.FOUR_CROPS, tiny.ONE_CROP],
}


def learner_logprobs(model: StepVL, answer: Completion, shown: Sequence[Picture]) -> Tensor:
    group = Group(answer.prompt_ids, tuple(p.digest for p in shown), (answer.response_ids,), (0,))
    (row,) = pack([group], token_budget=512, image_token_id=model.image_token_id)
    with torch.no_grad():
        features = {p.digest: model.features([p.load()])[0] for p in shown}
        return PolicyModel(model.model, model.lm_head)(row, features, 1.0)[0]


def ask(shown: Sequence[Picture], seed: int = 0) -> Request:
    words = tiny.word_ids(4 * (len(shown) + 1))
    prompt = [token for i in range(len(shown)) for token in (*words[4 * i : 4 * i + 4], tiny.IMAGE)]
    return Request((*prompt, *words[-4:]), tuple(shown), max_tokens=16, seed=seed)


@pytest.mark.parametrize("kind", SHOWN)
def test_logprobs_of_sampled_tokens_agree(step_vl: Served, kind: str) -> None:
    shown = [tiny.picture(size, seed) for seed, size in enumerate(SHOWN[kind])]
    for answer in step_vl.engine.generate([ask(shown, seed) for seed in range(3)]):
        expected = learner_logprobs(step_vl.model, answer, shown)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["text only", "several pictures"])
def test_a_response_sampled_in_pieces_has_the_same_logprobs(step_vl: Served, kind: str) -> None:
    """Samples a response in two pieces, as in partial rollouts. The second prompt contains the tokens of the first
    piece."""
    shown = [tiny.picture(size, seed) for seed, size in enumerate(SHOWN[kind])]
    request = replace(ask(shown), max_tokens=3)
    starts = step_vl.engine.generate([replace(request, seed=seed) for seed in range(8)])
    start = next(start for start in starts if start.finish == "length")
    (rest,) = step_vl.engine.generate([replace(request, prompt_ids=request.prompt_ids + start.response_ids)])
    assert rest.prompt_ids == start.prompt_ids + start.response_ids
    whole = replace(start, response_ids=start.response_ids + rest.response_ids, logprobs=start.logprobs + rest.logprobs)
    expected = learner_logprobs(step_vl.model, whole, shown)
    torch.testing.assert_close(torch.tensor(whole.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["text only", "one picture", "several pictures"])
def test_logprobs_of_given_tokens_agree(step_vl: Served, kind: str) -> None:
    shown = [tiny.picture(size, seed) for seed, size in enumerate(SHOWN[kind])]
    given, prompt = tiny.word_ids(10, seed=7), ask(shown)
    scored = step_vl.engine.score(prompt.prompt_ids + given, shown)
    (expanded,) = step_vl.engine.generate([prompt])
    assert len(scored) == len(expanded.prompt_ids) + len(given) - 1
    answer = Completion(expanded.prompt_ids, given, tuple(scored[-len(given) :]), "stop")
    expected = learner_logprobs(step_vl.model, answer, shown)
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [tiny.NO_CROP, tiny.ONE_CROP, tiny.FOUR_CROPS])
def test_another_picture_changes_the_logprobs(step_vl: Served, size: tuple[int, int]) -> None:
    """Pictures must change the logprobs. Otherwise, the other tests do not show that pictures are handled correctly."""
    tokens = (tiny.IMAGE, *tiny.word_ids(20))
    one, two = (torch.tensor(step_vl.engine.score(tokens, [tiny.picture(size, seed)])[-20:]) for seed in (1, 2))
    assert (one - two).abs().max() > 1e-2


def _engine_views(
    engine: Engine, sizes: list[tuple[int, int]], config: StepVLConfig
) -> list[tuple[int, Tensor, Tensor]]:
    from rollout.vllm.step_vl import ScaledImageProcessor

    processor = ScaledImageProcessor(config)
    seen = [processor(tiny.image(size)) for size in sizes]
    tokens = [processor.get_num_image_tokens(*size) for size in sizes]
    return [(n, s["pixel_values"], s["patch_pixel_values"]) for n, s in zip(tokens, seen, strict=True)]


def test_engine_and_learner_have_the_same_pixels_and_token_counts(step_vl: Served) -> None:
    sizes = [
        tiny.NO_CROP,
        tiny.ONE_CROP,
        WIDE_CROP,
        tiny.FOUR_CROPS,
        (100, 40),
        (700, 90),
        (90, 20),
        (750, 400),
        (31, 130),
    ]
    config = step_vl.model.config
    for size, (count, whole, crops) in zip(sizes, step_vl.engine.run(_engine_views, sizes, config), strict=True):
        assert picture_tokens(size, tiny.GLOBAL_SIZE, tiny.CROP_SIZE, 36, 25) == count
        own = views(tiny.image(size), tiny.GLOBAL_SIZE, tiny.CROP_SIZE)
        torch.testing.assert_close(own.global_view, whole[0], atol=1e-5, rtol=0)
        assert len(own.crops) == len(crops)
        for mine, theirs in zip(own.crops, crops, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
