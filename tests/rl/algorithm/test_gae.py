"""Compares the advantages of rl.algorithm.gae with values computed by hand and with the results of a plain loop."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from rl.algorithm.gae import gae, normalize, terminal_rewards

GAMMAS_LAMS = [(1.0, 1.0), (1.0, 0.95), (0.99, 1.0), (0.9, 0.5), (1.0, 0.0), (0.0, 0.9), (0.0, 0.0)]


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def loop_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: object, lam: object, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes GAE by its definition, token by token, in the dtype of `values`. `gamma` and `lam` are single numbers,
    or arrays of shape [N] with one number per row."""
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
    # The one-step error is reward + gamma * next value - value.
    # First token: 0 + 0.5 * 0.25 - 0.5 = -0.375. Last token, which has no next value: 1 - 0.25 = 0.75.
    torch.testing.assert_close(advantages, row(-0.375, 0.75))


def test_every_token_between_multiplies_by_gamma_and_lambda() -> None:
    advantages, returns = gae(row(0, 0, 8), row(0, 0, 0), row(1, 1, 1).bool(), gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, row(0.5, 2, 8))
    torch.testing.assert_close(returns, row(0.5, 2, 8))


def test_tool_text_between_two_response_tokens_does_not_change_the_result() -> None:
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
    # The advantage is reward + gamma * next value - value + gamma * lambda * next advantage.
    # Last token, with the bootstrap as the next value: 0 + 0.5 * 4 - 2 = 0.
    # First token: 0 + 0.5 * 2 - 1 + 0.25 * 0 = 0.
    torch.testing.assert_close(advantages, row(0, 0, 0))
    torch.testing.assert_close(returns, row(1, 2, 0))


def test_bootstrap_of_a_row_without_tokens_is_ignored() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    advantages, returns = gae(row(1, 1, 1), row(1, 1, 1), nothing, gamma=1, lam=1, bootstrap=torch.tensor([5.0]))
    assert not advantages.any() and not returns.any()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), GAMMAS_LAMS)
@pytest.mark.parametrize("columns", [1, 2, 300])
def test_equals_the_loop(gamma: float, lam: float, holes: bool, with_bootstrap: bool, columns: int) -> None:
    rewards, values, mask = (x if x.dtype == torch.bool else x.double() for x in random_case(7, columns, holes))
    ending = torch.linspace(-1, 1, 7, dtype=torch.float64) if with_bootstrap else None
    got = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=ending)
    torch.testing.assert_close(got, loop_gae(rewards, values, mask, gamma, lam, ending), rtol=1e-12, atol=1e-12)


def test_advantages_of_long_responses_are_the_rounded_float64_result() -> None:
    cases = [(1.0, 1.0), (1.0, 0.999), (1.0, 0.95), (0.9999, 1.0), (0.99, 0.9), (1.0, 0.0), (0.0, 1.0)]
    rewards, values, _ = random_case(2, 65_536, holes=False)
    mask = torch.stack([torch.ones(65_536), torch.rand(65_536, generator=torch.Generator().manual_seed(2))]) > 0.3
    # One batch contains all cases: two rows for each (gamma, lam). So the slow loop runs only once per precision.
    gamma, lam = np.repeat(np.array(cases), 2, axis=0).T
    many = [x.repeat(len(cases), 1) for x in (rewards, values, mask)]
    exact = loop_gae(many[0].double(), many[1].double(), many[2], gamma, lam)
    single = loop_gae(many[0], many[1], many[2], gamma, lam)
    for case, (g, lm) in enumerate(cases):
        rows = slice(2 * case, 2 * case + 2)
        for got, loop, truth in zip(gae(rewards, values, mask, gamma=g, lam=lm), single, exact, strict=True):
            torch.testing.assert_close(got, truth[rows].float(), rtol=1.2e-7, atol=1e-12)
            ours, theirs = (x.double() - truth[rows] for x in (got, loop[rows]))
            assert ours.abs().max() <= theirs.abs().max(), (g, lm)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_result_is_the_same_for_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> None:
    rewards, values, mask = random_case(50_001, 64, holes=True)  # the threads get four tasks; the last task is smaller
    set_threads(1)
    alone = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    set_threads(3)
    shared = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    torch.testing.assert_close(shared, loop_gae(rewards, values, mask, 0.99, 0.9), rtol=1e-4, atol=1e-5)


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    cases = [random_case(20, 500, holes=True, seed=seed) for seed in range(8)]
    expected = [gae(*case, gamma=1, lam=0.9) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda case: gae(*case, gamma=1, lam=0.9), cases))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_rows_of_a_batch_do_not_affect_each_other() -> None:
    rewards, values, mask = random_case(6, 100, holes=True)
    values[3] = torch.nan
    together = gae(rewards, values, mask, gamma=0.99, lam=0.9)[0]
    for i in (0, 1, 2, 4, 5):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], gamma=0.99, lam=0.9)[0]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)


def test_values_outside_the_mask_are_never_read() -> None:
    rewards, values, mask = random_case(6, 100, holes=True)
    expected = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    for garbage in (torch.nan, torch.inf):
        got = gae(*(x.masked_fill(~mask, garbage) for x in (rewards, values)), mask=mask, gamma=0.99, lam=0.9)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_results_are_float32_or_float64_like_the_values(given: torch.dtype, result: torch.dtype) -> None:
    values = row(0.5, 0.25).to(given)
    got = gae(row(0, 1), values, row(1, 1).bool(), gamma=1, lam=1, bootstrap=torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(got, (row(0.5, 0.75).to(result), row(1, 1).to(result)))


def test_tensors_may_be_views_that_require_gradients_and_stay_as_they_are() -> None:
    rewards, values, mask = random_case(100, 6, holes=True)
    expected = gae(rewards.T.clone(), values.T.clone(), mask.T.clone(), gamma=0.99, lam=0.9)
    before = values.clone()
    got = gae(rewards.T, values.requires_grad_().T, mask.T, gamma=0.99, lam=0.9)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(values, before) and not any(x.requires_grad for x in got)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_has_empty_advantages(shape: tuple[int, int]) -> None:
    advantages, returns = gae(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape).bool(), gamma=1, lam=1)
    assert advantages.shape == returns.shape == shape


def test_wrong_arguments_say_what_to_do() -> None:
    x, mask = row(1, 2), row(1, 1).bool()
    with pytest.raises(ValueError, match=r"same shape \[N, R\]"):
        gae(x, row(1, 2, 3), mask, gamma=1, lam=1)
    with pytest.raises(ValueError, match=r"mask\.bool\(\)"):
        gae(x, x, x, gamma=1, lam=1)
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        gae(x, x, mask, gamma=1.5, lam=1)
    with pytest.raises(ValueError, match="pass 1 values, one per response"):
        gae(x, x, mask, gamma=1, lam=1, bootstrap=torch.zeros(2))


def test_normalised_advantages_have_mean_zero_and_population_std_one_over_chosen_tokens() -> None:
    normal = normalize(row(1, 3, 100, 5), row(1, 1, 0, 1).bool())
    # The chosen tokens have the mean 3 and the variance (4 + 0 + 4) / 3.
    torch.testing.assert_close(normal, row(-2, 0, 0, 2) / (8 / 3) ** 0.5)


def test_equal_advantages_normalise_to_zero() -> None:
    assert normalize(torch.full((5, 7), 0.1), torch.ones(5, 7, dtype=torch.bool)).abs().max() < 1e-6


def test_normalising_without_a_chosen_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no token to normalise"):
        normalize(row(1, 2), row(0, 0).bool())


def test_the_last_chosen_token_gets_the_whole_reward() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    rewards = terminal_rewards(torch.tensor([1.0, 0.5, 0.0]), mask)
    assert rewards.tolist() == [[0, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]]


def test_a_score_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1\] have a score but no token"):
        terminal_rewards(torch.tensor([0.0, 1.0]), torch.zeros(2, 3, dtype=torch.bool))
