"""Compares both implementations of attention in packed groups with attention that uses a full mask. Outputs and
gradients must agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rl.model.attention import Layout, Span, batches_of, flex_groups, packed_groups, sees

HEADS, KV_HEADS, DIM = 4, 2, 16
LAYOUTS = {
    "one sequence": Layout((Span(7, ()),)),
    "responses without a prompt": Layout((Span(0, (3, 40)),)),
    "one response": Layout((Span(5, (4,)),)),
    "many short responses": Layout((Span(9, (3, 1, 8, 2, 8, 5)),)),
    "lengths far apart": Layout((Span(3, (150, 2, 70, 60, 149)),)),
    "several groups": Layout((Span(40, (5, 9)), Span(1, (1,)), Span(40, ()), Span(60, (33, 35, 80)), Span(0, (6,)))),
}


def inputs(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns random q, k and v in the layout of transformers: shape [1, heads, T, D], in memory [1, T, heads, D]."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(1, length, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [x.to(dtype).transpose(1, 2) for x in made]


def visible(layout: Layout) -> Tensor:
    """Returns a boolean matrix [T, T]. Entry (i, j) is True if token i sees token j."""
    places = torch.arange(layout.length)
    return sees(*layout.owners, places[:, None], places)


def plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    repeated = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, *repeated, attn_mask=visible(layout).to(q.device), scale=0.3)


def on_cpu(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return packed_groups(torch.nn.Module(), q, k, v, None, 0.3, layout=layout)[0].transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return flex_groups(q, k, v, layout, 0.3)


def results(attend, layout: Layout, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Returns the output of `attend`, and the gradients of q, k and v."""
    given = [x.detach().to(device).requires_grad_() for x in inputs(layout.length, dtype)]
    out = attend(*given, layout)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad((out * weights).sum(), given))]


def test_a_token_sees_its_prompt_and_its_own_response_up_to_itself():
    seen = visible(Layout((Span(2, (1, 2)), Span(1, ()))))
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_outputs_and_gradients_equal_masked_attention(layout):
    for ours, expected in zip(results(on_cpu, layout), results(plain, layout), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_attention_with_the_block_mask_for_gpus_has_the_same_outputs(layout):
    """This test compares only outputs, because torch has no backward pass of FlexAttention on CPUs. The next test
    compares gradients on GPUs."""
    q, k, v = inputs(layout.length)
    torch.testing.assert_close(flex(q, k, v, layout), plain(q, k, v, layout), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_outputs_and_gradients_on_a_gpu_equal_masked_attention(layout):
    for ours, expected in zip(results(flex, layout, device="cuda"), results(plain, layout), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)


def test_bfloat16_stays_as_close_to_float32_as_masked_attention_does():
    layout = LAYOUTS["lengths far apart"]
    exact = results(plain, layout)
    for ours, other, true in zip(*(results(a, layout, torch.bfloat16) for a in (on_cpu, plain)), exact, strict=True):
        assert (ours - true).abs().mean() < 1.5 * (other - true).abs().mean()


def test_segments_share_a_call_only_when_padding_costs_little():
    segments = [(0, 100), (100, 80), (180, 74), (254, 32), (286, 1)]
    assert [[length for _, length in batch] for batch in batches_of(segments)] == [[100, 80], [74], [32, 1]]


def test_every_token_is_in_exactly_one_batch():
    layout = LAYOUTS["several groups"]
    tokens = []
    for part in layout.causal:
        tokens += (part.tokens.flatten() if part.real is None else part.tokens[part.real]).tolist()
    assert sorted(tokens) == list(range(layout.length))
