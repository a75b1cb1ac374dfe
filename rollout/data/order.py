"""The order in which a run draws its prompts. It depends on the seed and a position, so that any run can continue."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from rl.types import Prompt


class Order(Protocol):
    """An endless sequence of prompts."""

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Returns prompts number `position` to `position + count - 1`."""
        ...


class PromptOrder:
    """One shuffled pass over all prompts after another. No pass skips a prompt.

    The only state is the position, which the caller keeps: the number of prompts drawn since the run began.
    Pass e is sorted by SHA-256 of (seed, e, id). The order therefore depends neither on Python's version nor on the
    order of the rows on disk. A call that crosses the end of a pass may return the same prompt twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("no prompts to draw from")
        self._prompts, self._seed = list(prompts), seed
        self._passes: dict[int, list[Prompt]] = {}  # the two that were used last, by number

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Returns prompts number `position` to `position + count - 1` of all passes, end to end."""
        places = (divmod(number, len(self._prompts)) for number in range(position, position + count))
        return [self._shuffled(epoch)[place] for epoch, place in places]

    def _shuffled(self, epoch: int) -> list[Prompt]:
        if epoch not in self._passes:
            self._passes = {e: order for e, order in self._passes.items() if e == epoch - 1}
            self._passes[epoch] = sorted(self._prompts, key=lambda prompt: self._key(epoch, prompt))
        return self._passes[epoch]

    def _key(self, epoch: int, prompt: Prompt) -> bytes:
        return hashlib.sha256(f"{self._seed}/{epoch}/{prompt.id}".encode()).digest()


class MixedOrder:
    """Prompts of several orders, mixed by weight.

    The prompt at position n comes from the order that is furthest behind its share of n + 1. Every stretch of the
    run therefore has prompts of all orders in proportion. The only state is the position, as in PromptOrder.

    Args:
        weights: one number over 0 per order.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        self._orders, self._shares = list(orders), [weight / sum(weights) for weight in weights]
        self._drawn = [0] * len(orders)  # prompts drawn from each order
        self._places: list[tuple[int, int]] = []  # (order, position in it) of each position so far

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Returns prompts number `position` to `position + count - 1`."""
        while len(self._places) < position + count:
            total = len(self._places) + 1
            behind = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
            chosen = behind.index(max(behind))
            self._places.append((chosen, self._drawn[chosen]))
            self._drawn[chosen] += 1
        places = self._places[position : position + count]
        return [prompt for order, place in places for prompt in self._orders[order].prompts_at(place, 1)]
