"""Tests the sampler, which uses one uniform random number per token. tests/rollout/vllm/test_engine.py tests that vLLM
uses this sampler."""

import torch

from rollout.vllm.sampler import inverse_cdf

CHANCES = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])


def draw(*uniform):
    return inverse_cdf(CHANCES.log().expand(len(uniform), -1), torch.tensor(uniform, dtype=torch.float64)).tolist()


def test_each_token_has_a_part_of_the_unit_interval_as_long_as_its_probability():
    assert draw(0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999) == [1, 1, 3, 3, 4, 4]


def test_impossible_tokens_are_never_sampled_even_at_the_ends_of_the_interval():
    assert draw(0.0, torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))) == [1, 4]


def test_frequencies_equal_the_probabilities_in_a_vocabulary_of_many_rare_tokens():
    logprobs = torch.randn(1000, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    even = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # evenly spaced numbers instead of random numbers
    found = torch.cat([inverse_cdf(logprobs.expand(len(u), -1), u) for u in even.split(2000)])
    counts = found.bincount(minlength=1000) / 20_000
    torch.testing.assert_close(counts, logprobs.exp(), atol=5.1e-5, rtol=0)


def test_nan_logprobs_give_a_token_id_inside_the_vocabulary():
    assert inverse_cdf(torch.full((1, 6), torch.nan), torch.tensor([0.3], dtype=torch.float64)).tolist() == [5]
