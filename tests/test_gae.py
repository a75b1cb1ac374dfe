"""rl.gae: advantages by hand, against a plain loop, with holes, and to the last digit on long responses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rl.gae import gae, normalize, terminal_rewards

GAMMAS_LAMS = [(1.0, 1.0), (1.0, 0.95), (0.99, 1.0), (0.9, 0.5), (1.0, 0.0), (0.0, 0.9), (0.0, 0.0)]


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def loop_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: object, lam: object, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in the dtype of `values`; gamma and lam may differ by row ([N])."""
    r, v, here = rewards.T.numpy(), values.T.numpy(), mask.T.numpy()
    gamma, decay = (np.asarray(x, v.dtype) for x in (gamma, np.asarray(gamma) * np.asarray(lam)))
    advantages = np.zeros_like(v)
    v_next = np.zeros_like(v[0]) if bootstrap is None else bootstrap.numpy()
    a_next = np.zeros_like(v[0])
    for t in reversed(range(len(v))):
        a_next = np.where(here[t], r[t] + gamma * v_next - v[t] + decay * a_next, a_next)
        v_next = np.where(here[t], v[t], v_next)
        advantages[t] = np.where(here[t], a_next, 0)
    returns = np.where(here, advantages + v, 0)
    return torch.from_numpy(advantages.T), torch.from_numpy(returns.T)


def random_case(rows: int, columns: int, holes: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    mask = torch.arange(columns) < lengths
    if holes:
        mask &= torch.rand(rows, columns, generator=generator) < 0.7
    return (
        torch.randn(rows, columns, generator=generator),
        torch.randn(rows, columns, generator=generator),
        mask,
    )


def test_gamma_and_lambda_one_give_reward_minus_value_at_every_token() -> None:
    advantages, returns = gae(row(0, 0, 1), row(0.2, 0.5, 0.9), row(1, 1, 1).bool(), gamma=1, lam=1)
    torch.testing.assert_close(advantages, row(0.8, 0.5, 0.1))
    torch.testing.assert_close(returns, row(1, 1, 1))


def test_lambda_zero_is_the_one_step_error() -> None:
    advantages, _ = gae(row(0, 1), row(0.5, 0.25), row(1, 1).bool(), gamma=0.5, lam=0)
    # 0 + 0.5 * 0.25 - 0.5 = -0.375;  1 + 0 - 0.25 = 0.75
    torch.testing.assert_close(advantages, row(-0.375, 0.75))


def test_every_token_between_multiplies_by_gamma_and_lambda() -> None:
    advantages, returns = gae(row(0, 0, 8), row(0, 0, 0), row(1, 1, 1).bool(), gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, row(0.5, 2, 8))
    torch.testing.assert_close(returns, row(0.5, 2, 8))


def test_tool_text_between_two_response_tokens_changes_nothing() -> None:
    plain, _ = gae(row(0, 1), row(0.5, 0.25), row(1, 1).bool(), gamma=0.5, lam=0.9)
    spaced, returns = gae(
        row(7, 0, 7, 7, 1, 7), row(7, 0.5, 7, 7, 0.25, 7), row(0, 1, 0, 0, 1, 0).bool(), gamma=0.5, lam=0.9
    )
    torch.testing.assert_close(spaced[:, [1, 4]], plain)
    assert spaced[0, [0, 2, 3, 5]].tolist() == returns[0, [0, 2, 3, 5]].tolist() == [0, 0, 0, 0]


def test_bootstrap_is_the_value_after_the_last_token() -> None:
    advantages, returns = gae(
        row(0, 0, 9), row(1, 2, 9), row(1, 1, 0).bool(), gamma=0.5, lam=0.5, bootstrap=torch.tensor([4.0])
    )
    # last: 0 + 0.5 * 4 - 2 = 0;  first: 0 + 0.5 * 2 - 1 + 0.25 * 0 = 0
    torch.testing.assert_close(advantages, row(0, 0, 0))
    torch.testing.assert_close(returns, row(1, 2, 0))


def test_bootstrap_of_a_row_without_tokens_goes_nowhere() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    advantages, returns = gae(row(1, 1, 1), row(1, 1, 1), nothing, gamma=1, lam=1, bootstrap=torch.tensor([5.0]))
    assert not advantages.any() and not returns.any()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), GAMMAS_LAMS)
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 300])
def test_equals_the_loop(gamma: float, lam: float, holes: bool, with_bootstrap: bool, columns: int) -> None:
    rewards, values, mask = (x if x.dtype == torch.bool else x.double() for x in random_case(7, columns, holes))
    ending = torch.linspace(-1, 1, 7, dtype=torch.float64) if with_bootstrap else None
    got = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=ending)
    torch.testing.assert_close(got, loop_gae(rewards, values, mask, gamma, lam, ending), rtol=1e-12, atol=1e-12)


def test_long_responses_are_as_precise_as_a_float32_loop() -> None:
    cases = [(1.0, 1.0), (1.0, 0.999), (1.0, 0.95), (0.9999, 1.0), (0.99, 0.9), (1.0, 0.0), (0.0, 1.0)]
    rewards, values, _ = random_case(2, 65_536, holes=False)
    mask = torch.stack([torch.ones(65_536), torch.rand(65_536, generator=torch.Generator().manual_seed(2))]) > 0.3
    # All (gamma, lam) as rows, so that the slow loop runs once per precision.
    gamma, lam = np.repeat(np.array(cases), 2, axis=0).T
    many = [x.repeat(len(cases), 1) for x in (rewards, values, mask)]
    exact = loop_gae(many[0].double(), many[1].double(), many[2], gamma, lam)
    single = loop_gae(many[0], many[1], many[2], gamma, lam)
    for case, (g, lm) in enumerate(cases):
        rows = slice(2 * case, 2 * case + 2)
        for got, loop, truth in zip(gae(rewards, values, mask, gamma=g, lam=lm), single, exact, strict=True):
            ours, theirs = (x.double() - truth[rows] for x in (got, loop[rows]))
            assert ours.square().mean() <= 1.1 * theirs.square().mean(), (g, lm)
            assert ours.abs().max() <= 2 * theirs.abs().max(), (g, lm)


def test_lowered_matmul_precision_does_not_reach_the_advantages() -> None:
    rewards, values, mask = random_case(4, 1000, holes=False)
    before = torch.get_float32_matmul_precision()
    expected = gae(rewards.double(), values.double(), mask, gamma=1, lam=0.95)[0].float()
    try:
        torch.set_float32_matmul_precision("medium")
        got = gae(rewards, values, mask, gamma=1, lam=0.95)[0]
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_rows_of_a_batch_do_not_affect_each_other_nor_does_padding() -> None:
    rewards, values, mask = random_case(6, 100, holes=True)
    together = gae(rewards, values, mask, gamma=0.99, lam=0.9)[0]
    spoiled = torch.where(mask, values, torch.nan)
    spoiled[3] = torch.nan
    for i in (0, 1, 2, 4, 5):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], gamma=0.99, lam=0.9)[0]
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(gae(rewards, spoiled, mask, gamma=0.99, lam=0.9)[0][i : i + 1], alone)


def test_half_precision_values_are_worked_on_in_float32() -> None:
    advantages, returns = gae(row(0, 1).half(), row(1, 1).half(), row(1, 1).bool(), gamma=1, lam=1)
    assert advantages.dtype == returns.dtype == torch.float32


def test_wrong_arguments_say_what_to_do() -> None:
    x, mask = row(1, 2), row(1, 1).bool()
    with pytest.raises(ValueError, match=r"one shape \[N, R\]"):
        gae(x, row(1, 2, 3), mask, gamma=1, lam=1)
    with pytest.raises(ValueError, match=r"mask\.bool\(\)"):
        gae(x, x, x, gamma=1, lam=1)
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        gae(x, x, mask, gamma=1.5, lam=1)
    with pytest.raises(ValueError, match="one each"):
        gae(x, x, mask, gamma=1, lam=1, bootstrap=torch.zeros(2))


def test_normalised_advantages_have_mean_zero_and_population_std_one_over_chosen_tokens() -> None:
    normal = normalize(row(1, 3, 100, 5), row(1, 1, 0, 1).bool())
    # mean 3, variance (4 + 0 + 4) / 3
    torch.testing.assert_close(normal, row(-2, 0, 0, 2) / (8 / 3) ** 0.5)


def test_equal_advantages_normalise_to_zero() -> None:
    assert normalize(torch.full((5, 7), 0.1), torch.ones(5, 7, dtype=torch.bool)).abs().max() < 1e-6


def test_normalising_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no token to normalise"):
        normalize(row(1, 2), row(0, 0).bool())


def test_the_whole_reward_is_paid_on_the_last_chosen_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    rewards = terminal_rewards(torch.tensor([1.0, 0.5, 0.0]), mask)
    assert rewards.tolist() == [[0, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]]


def test_a_score_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1\] have a score but no token"):
        terminal_rewards(torch.tensor([0.0, 1.0]), torch.zeros(2, 3, dtype=torch.bool))
