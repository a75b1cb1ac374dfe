"""Tests logprobs and entropies that are computed in parts. Their values and gradients must be the same as if they were
computed from all logits at once."""

import pytest
import torch

from rl.model import logprobs
from rl.model.logprobs import token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_computed_in_parts_have_the_same_values_and_gradients(monkeypatch, temperature):
    monkeypatch.setattr(logprobs, "LOGITS", 70)  # 70 logits are 7 tokens, because the vocabulary has 10 tokens
    monkeypatch.setattr(logprobs, "LEAST", 1)
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    targets = torch.randint(10, (20,))

    def at_once():
        logs = (hidden @ head.T / temperature).log_softmax(-1)
        return logs.gather(-1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)

    found = []
    for compute in (lambda: token_logprobs(hidden, head, targets, temperature), at_once):
        values, entropies = compute()
        weights = torch.linspace(-1, 1, 20)
        gradients = torch.autograd.grad((values * weights - entropies * weights.flip(0)).sum(), (hidden, head))
        found.append((values, entropies, *gradients))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_that_are_never_sampled_are_left_out_of_the_distribution(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (5, 12))
    targets = torch.tensor([0, 1, 3, 4, 11])
    logprobs, entropies = token_logprobs(hidden, head, targets, temperature, never=(2, 7))
    logits = (hidden @ head.T)[:, [n for n in range(12) if n not in (2, 7)]] / temperature
    expected = logits.log_softmax(-1)
    places = torch.tensor([0, 1, 2, 3, 9])
    torch.testing.assert_close(logprobs, expected.gather(1, places[:, None])[:, 0])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1))
    (logprobs.sum() + 0.3 * entropies.sum()).backward()
    ours, head.grad = head.grad, None
    (expected.gather(1, places[:, None]).sum() - 0.3 * (expected.exp() * expected).sum()).backward()
    torch.testing.assert_close(ours, head.grad)
