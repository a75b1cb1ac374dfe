"""Tests the vLLM engine: problems of vLLM that the engine avoids, the weight transfer with the backend `host`, and
requests that are refused."""

import copy
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from benchmarks.harness import busy_process
from rl.model.config import StepVLConfig
from rl.types import Completion, Picture, Request
from rollout.vllm.engine import Engine
from tests.conftest import Served
from tests.support import tiny
from tests.support.engine_process import engine, shared_memory_segments, vllm_process

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def requests(count: int = 4, length: int = 20, max_tokens: int = 12, temperature: float = 1.0) -> list[Request]:
    return [Request(tiny.word_ids(length, i), (), max_tokens, i, temperature) for i in range(count)]


def all_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns all tensors in the form that `load` needs. If the embeddings are tied, the head is included too."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return weights | {HEAD: weights.get(HEAD, weights[EMBEDDING])}


def changed(model: Qwen3ForCausalLM, seed: int) -> Qwen3ForCausalLM:
    model = copy.deepcopy(model)
    tiny.randomize(model, seed)
    return model


def expected_logprobs(model: Qwen3ForCausalLM, answer: Completion, temperature: float = 1.0) -> Tensor:
    ids = torch.tensor([answer.prompt_ids + answer.response_ids])
    with torch.no_grad():
        logprobs = (model(input_ids=ids).logits / temperature).log_softmax(-1)
    start = len(answer.prompt_ids)
    return logprobs[0, start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]


def assert_sampled_from(model: Qwen3ForCausalLM, answers: list[Completion], temperature: float = 1.0) -> None:
    for answer in answers:
        torch.testing.assert_close(
            torch.tensor(answer.logprobs), expected_logprobs(model, answer, temperature), atol=1e-4, rtol=0
        )


def test_a_call_gives_the_same_bits_each_time_beside_a_busy_process(step_vl: Served) -> None:
    pictures = [tiny.picture(size) for size in (tiny.NO_CROP, tiny.FOUR_CROPS)]
    shown = [Request((tiny.IMAGE, *tiny.word_ids(9, i)), (pictures[i % 2],), 12, seed=i) for i in range(4)]
    with busy_process():
        first, *others = (step_vl.engine.generate([*requests(8), *shown]) for _ in range(100))
    assert all(other == first for other in others)


def test_an_engine_with_tied_embeddings_starts_with_its_folders_weights(tmp_path: Path) -> None:
    model = tiny.make_text_model(tmp_path, tied=True)
    with engine(tmp_path) as started:
        assert_sampled_from(model, started.generate(requests(2)))


@pytest.mark.parametrize("seed", [1, 2])
def test_every_load_updates_tied_embeddings(tied: Served, seed: int) -> None:
    model = changed(tied.model, seed)
    tied.engine.load(all_weights(model), step=seed)
    assert tied.engine.run(attrgetter("policy_step")) == seed
    assert_sampled_from(model, tied.engine.generate(requests()))


def test_tied_embeddings_must_be_sent_twice(tied: Served) -> None:
    weights = all_weights(tied.model)
    del weights[HEAD]
    with pytest.raises(ValueError, match=r"send both model\.embed_tokens\.weight and lm_head\.weight"):
        tied.engine.load(weights, step=1)


def test_each_token_uses_one_uniform_number_from_the_requests_own_generator(tied: Served) -> None:
    model = changed(tied.model, 7)
    tied.engine.load(all_weights(model), step=7)
    for request, answer in zip(batch := requests(), tied.engine.generate(batch), strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        ids = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 : -1].softmax(-1, dtype=torch.float64)
        drawn = torch.rand(len(answer.response_ids), dtype=torch.float64, generator=generator)
        assert torch.searchsorted(chances.cumsum(-1), drawn[:, None]).tolist() == [[i] for i in answer.response_ids]


def test_a_prompt_is_computed_again_after_a_load(tied: Served) -> None:
    long = requests(1, length=300)  # longer than vLLM's cache block of 128 tokens
    for seed in (3, 4):
        model = changed(tied.model, seed)
        tied.engine.load(all_weights(model), step=seed)
        assert_sampled_from(model, tied.engine.generate(long))


def test_weights_may_be_bfloat16_tensors_or_read_only_arrays(tied: Served) -> None:
    model = changed(tied.model, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    arrays = {name: tensor.numpy() for name, tensor in all_weights(model).items()}
    for array in arrays.values():
        array.flags.writeable = False
    halves = {name: tensor.bfloat16() for name, tensor in all_weights(model).items()}
    for weights in (arrays, halves):
        tied.engine.load(weights, step=5)
        assert_sampled_from(model, tied.engine.generate(requests()))


def _load_in_pieces(engine: Engine, weights: dict[str, np.ndarray], size: int) -> int:
    from rollout.weights import host

    whole, host.SEGMENT_BYTES = host.SEGMENT_BYTES, size
    try:
        engine.load(weights, step=6)
        return len(list(host.batches(weights)))
    finally:
        host.SEGMENT_BYTES = whole


def test_weights_larger_than_a_segment_are_sent_in_batches_and_leave_no_shared_memory(tied: Served) -> None:
    before = shared_memory_segments()
    model = changed(tied.model, 6)
    arrays = {name: tensor.numpy() for name, tensor in all_weights(model).items()}
    # The segments are so small that one layer needs several segments.
    assert tied.engine.run(_load_in_pieces, arrays, 20_000) > 5
    assert_sampled_from(model, tied.engine.generate(requests()))
    assert shared_memory_segments() == before


def test_part_of_a_layer_is_refused_and_later_calls_say_that_the_engine_must_be_restarted(tmp_path: Path) -> None:
    before = shared_memory_segments()
    model = tiny.make_text_model(tmp_path, tied=False)
    with engine(tmp_path) as started:
        assert_sampled_from(model, started.generate(requests(1)))  # an untied model can be used before the first load
        with pytest.raises(RuntimeError, match=r"incomplete: model\.layers\.0\.self_attn\.qkv_proj"):
            started.load({"model.layers.0.self_attn.q_proj.weight": torch.zeros(128, 64)}, step=1)
        with pytest.raises(RuntimeError, match="restart the engine"):
            started.generate(requests(1))
    assert shared_memory_segments() == before


def test_weights_of_the_decoder_alone_can_be_loaded(step_vl: Served) -> None:
    ask = [Request((tiny.IMAGE, *tiny.word_ids(9)), (tiny.picture(tiny.FOUR_CROPS),), 8, seed=1)]
    before = step_vl.engine.generate(ask)
    trained = {k: v for k, v in step_vl.model.state_dict().items() if k.startswith(("model.", "lm_head."))}
    step_vl.engine.load({name: 1.5 * tensor for name, tensor in trained.items()}, step=1)
    assert step_vl.engine.generate(ask) != before
    step_vl.engine.load(trained, step=2)
    assert step_vl.engine.generate(ask) == before  # the vision tower has not changed


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_belong_to_the_sampled_distribution(tied: Served, temperature: float) -> None:
    tied.engine.load(all_weights(tied.model), step=0)
    assert_sampled_from(tied.model, tied.engine.generate(requests(temperature=temperature)), temperature)


def test_the_same_call_gives_the_same_bits_after_other_calls(step_vl: Served) -> None:
    shown = (tiny.picture(tiny.FOUR_CROPS, 1), tiny.picture(tiny.NO_CROP, 2))
    ask = [Request((tiny.IMAGE, tiny.IMAGE, *tiny.word_ids(150, i % 2)), shown, 8, seed=i) for i in range(4)]
    first = step_vl.engine.generate(ask)
    step_vl.engine.generate(ask[:1])  # without a reset, the caches would keep the data of this request
    step_vl.engine.generate(requests(3))
    assert step_vl.engine.generate(ask) == first
    assert [a.response_ids for a in first] == [a.response_ids for a in step_vl.engine.generate(ask)]


def _reuse(engine: Engine, batch: list[Request]) -> tuple[int, int]:
    """Calls generate() once. Returns the number of prompt tokens that came from the prefix cache, and the number of
    views and crops that the vision tower encoded."""
    from rollout.vllm.step_vl import PatchedStepVL

    cached: list[int | None] = []
    encoded: list[int] = []
    run, project = engine._run, PatchedStepVL._process_image_features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PatchedStepVL, "_process_image_features", lambda self, x: encoded.append(len(x)) or project(self, x)
        )

        def noting(*given: Any) -> Iterator[list[tuple[int, Any]]]:
            for finished in cast(Any, run)(*given):
                cached.extend(output.num_cached_tokens for _, output in finished)
                yield finished

        patch.setattr(engine, "_run", noting)
        engine.generate(batch)
    return sum(n or 0 for n in cached), sum(encoded)


def test_nothing_is_reused_from_earlier_calls(step_vl: Served) -> None:
    shown = (tiny.picture(tiny.NO_CROP),)
    batch = [Request((tiny.IMAGE, *tiny.word_ids(300)), shown, 2, seed=0)]
    for _ in range(2):
        assert step_vl.engine.run(_reuse, batch) == (0, 1)


def test_requests_of_one_call_share_their_pictures(step_vl: Served) -> None:
    shown = (tiny.picture(tiny.NO_CROP), tiny.picture(tiny.ONE_CROP))
    batch = [Request((tiny.IMAGE, tiny.IMAGE, *tiny.word_ids(5, i)), shown, 2, seed=i) for i in range(4)]
    assert step_vl.engine.run(_reuse, batch)[1] == 2 + 1  # two global views and one crop


def test_each_request_keeps_its_own_seed(step_vl: Served) -> None:
    prompt = tiny.word_ids(10)
    batch = [Request(prompt, (), 12, seed=seed) for seed in (1, 2, 1)]
    one, two, again = (answer.response_ids for answer in step_vl.engine.generate(batch))
    assert one == again
    # With the `top_k: 1` of the folder's generation config, both responses would be equal. So this config is not used.
    assert one != two


def test_a_picture_that_cannot_be_read_any_more_costs_only_its_own_requests(step_vl: Served, tmp_path: Path) -> None:
    file = tmp_path / "gone.png"
    tiny.image(tiny.ONE_CROP).save(file)
    gone = Picture.of(file)
    assert gone.size == tiny.ONE_CROP  # the size is known before the file is removed, as in a run
    ask = [
        Request((tiny.IMAGE, *tiny.word_ids(9)), (picture,), 8, seed=1) for picture in (gone, tiny.picture((60, 50)))
    ]
    whole = step_vl.engine.generate(ask[1:])
    file.unlink()
    lost, answered, again = step_vl.engine.generate([ask[0], ask[1], ask[0]])
    assert [answered] == whole
    for one in (lost, again):
        assert one.response_ids == () and "gone.png) cannot be read" in one.unusable
    (only,) = step_vl.engine.generate(ask[:1])
    assert only.unusable == lost.unusable


def test_greedy_and_sampled_requests_in_one_call_are_refused(step_vl: Served) -> None:
    with pytest.raises(ValueError, match="must not be in one call"):
        step_vl.engine.generate([*requests(1), *requests(1, temperature=0.0)])


def test_greedy_requests_sample_the_most_likely_token(tied: Served) -> None:
    tied.engine.load(all_weights(tied.model), step=0)
    answers = tied.engine.generate(requests(2, temperature=0.0))
    assert_sampled_from(tied.model, answers)
    ids = torch.tensor([answers[0].prompt_ids])
    with torch.no_grad():
        assert answers[0].response_ids[0] == tied.model(input_ids=ids).logits[0, -1].argmax()


@pytest.mark.parametrize("size", [tiny.NO_CROP, tiny.ONE_CROP, tiny.FOUR_CROPS])
def test_a_single_picture_with_no_one_or_four_crops_is_served(step_vl: Served, size: tuple[int, int]) -> None:
    crops = {tiny.NO_CROP: 0, tiny.ONE_CROP: 1, tiny.FOUR_CROPS: 4}[size]
    (answer,) = step_vl.engine.generate([Request((tiny.IMAGE, *tiny.word_ids(3)), (tiny.picture(size),), 2, 0)])
    newlines = 1 if crops == 4 else 0
    assert answer.prompt_ids[-3:] == tiny.word_ids(3)
    assert len(answer.prompt_ids) == crops * (25 + 2) + newlines + (36 + 2) + 3


def test_responses_end_in_a_stop_token_or_at_their_length(step_vl: Served) -> None:
    assert step_vl.engine.run(attrgetter("stop_ids")) == (tiny.EOS, tiny.IMAGE)
    answers = step_vl.engine.generate(requests(24, max_tokens=30))
    stopped = [a for a in answers if a.finish == "stop"]
    assert stopped and len(stopped) < len(answers)
    assert all(a.response_ids[-1] in (tiny.EOS, tiny.IMAGE) for a in stopped)
    assert all(not {tiny.EOS, tiny.IMAGE} & set(a.response_ids[:-1]) for a in answers)
    assert all(len(a.response_ids) == len(a.logprobs) <= 30 for a in answers)
    assert all(len(a.response_ids) == 30 for a in answers if a.finish == "length")


def test_max_sequence_length_ends_a_response(step_vl: Served) -> None:
    answers = step_vl.engine.generate(requests(4, length=505, max_tokens=100))
    assert {len(a.response_ids) for a in answers if a.finish == "length"} == {512 - 505}


def test_the_error_for_an_invalid_request_says_what_is_wrong(step_vl: Served) -> None:
    shown = tiny.picture(tiny.NO_CROP)

    def refused(*prompt: int, images: int = 0, seed: int = 0, temperature: float = 1.0) -> str:
        with pytest.raises(ValueError) as error:
            step_vl.engine.generate([Request(prompt, (shown,) * images, 5, seed, temperature)])
        return str(error.value)

    assert "512 tokens with images, but max_sequence_length 512" in refused(*tiny.word_ids(512))
    assert "513 tokens" in refused(tiny.IMAGE, *tiny.word_ids(475), images=1)
    assert "has 1 pictures but 0 image tokens" in refused(9, images=1)
    assert "has 0 pictures but 1 image tokens" in refused(tiny.IMAGE)
    assert "max_images_per_prompt is 3" in refused(*(tiny.IMAGE,) * 4, images=4)
    assert "seed -1" in refused(9, seed=-1)
    assert "temperature 0.001" in refused(9, temperature=0.001)
    assert "-5" in refused(-5)


def test_a_device_that_the_installed_vllm_does_not_support_is_refused(step_vl: Served) -> None:
    with pytest.raises(ValueError, match="installed vLLM runs on 'cpu'"), engine(step_vl.folder, device="cuda"):
        pass


def _compare_with_vllm(sizes: list[tuple[int, int]]) -> list[str]:
    """Returns the differences between vLLM's picture processor and our own. Both processors use the 10B
    model's config."""
    from vllm.transformers_utils.processors.step3_vl import Step3VLImageProcessor

    from rollout.vllm.step_vl import ScaledImageProcessor

    ours, theirs = ScaledImageProcessor(StepVLConfig()), Step3VLImageProcessor()
    differences = []
    for size in sizes:
        if ours.get_num_image_tokens(*size) != theirs.get_num_image_tokens(*size):
            differences.append(f"{size}: tokens")
        mine, own = ours(tiny.image(size)), theirs(tiny.image(size))
        for name in ("pixel_values", "patch_pixel_values", "patch_newline_mask", "num_patches"):
            if not torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(own[name])):
                differences.append(f"{size}: {name}")
    return differences


def test_the_scaled_processor_equals_vllms_for_the_published_sizes() -> None:
    sizes = [(50, 60), (727, 300), (727, 700), (728, 728), (900, 500), (600, 130), (1000, 200), (300, 20), (3100, 900)]
    with vllm_process() as process:
        assert process.run(_compare_with_vllm, sizes) == []


def test_more_prompts_than_fit_into_one_step_give_the_same_responses_again(step_vl: Served) -> None:
    """If a step processed only part of a prompt, vLLM would rewind the random generator. Rewinding fails on CPUs."""
    shown = [tiny.picture(tiny.NO_CROP, seed) for seed in range(40)]
    prompt = (*tiny.word_ids(4), tiny.IMAGE, *tiny.word_ids(6, seed=1))
    requests = [Request(prompt, (shown[i % 40],), max_tokens=2, seed=i) for i in range(300)]
    first = step_vl.engine.generate(requests)
    assert sum(len(c.prompt_ids) for c in first) > 8192
    assert step_vl.engine.generate(requests) == first
