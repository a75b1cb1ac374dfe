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
