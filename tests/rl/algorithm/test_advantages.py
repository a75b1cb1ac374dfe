"""Tests that advantages and returns are computed correctly from rewards and values, also for cut responses and with
normalisation."""

import torch
from torch import Tensor

from rl.algorithm.advantages import gae_advantages

MASK = torch.tensor([[True, True], [True, False]])
REWARDS = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
VALUES = torch.tensor([[0.5, 0.5], [0.25, 0.0]])
FINAL = torch.tensor([9.0, 0.5])


def estimate(*, cut: Tensor | None = None, normalized: bool = False) -> tuple[Tensor, Tensor]:
    return gae_advantages(
        REWARDS,
        VALUES,
        MASK,
        gamma=1.0,
        lam=1.0,
        final_values=FINAL,
        bootstrapped=cut,
        normalized=normalized,
    )


def test_returns_are_the_rewards_and_advantages_are_returns_minus_values():
    advantages, returns = estimate()
    assert returns.tolist() == [[1, 1], [-1, 0]]
    assert advantages.tolist() == [[0.5, 0.5], [-1.25, 0]]


def test_a_cut_response_gets_its_final_value_instead_of_its_reward():
    advantages, returns = estimate(cut=torch.tensor([False, True]))
    assert returns.tolist() == [[1, 1], [0.5, 0]]
    assert advantages.tolist() == [[0.5, 0.5], [0.25, 0]]


def test_normalisation_changes_the_advantages_but_not_the_returns():
    advantages, returns = estimate(normalized=True)
    assert returns.tolist() == [[1, 1], [-1, 0]]
    chosen = advantages[MASK]
    torch.testing.assert_close(torch.stack((chosen.mean(), chosen.std(correction=0))), torch.tensor([0.0, 1.0]))
    assert advantages[1, 1] == 0
