"""Defines the order in which a run draws its prompts. The next prompts depend only on the seed and on the number of
prompts drawn so far, so an interrupted run can continue in the same order."""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Protocol

from rl.types import Prompt


class Order(Protocol):
    """An endless sequence of prompts."""

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Returns the prompts with the numbers `position` to `position + count - 1`."""
        ...


class PromptOrder:
    """Goes through all prompts in repeated passes, each in a new random order. Every pass contains every prompt once.

    The only state is the position: the number of prompts drawn since the run began. The caller stores the position.
    The prompts of pass number e are sorted by the SHA-256 of (seed, e, prompt id). So the order does not depend on
    Python's version or on the order of the rows on disk. A call that crosses the end of a pass may return the same
    prompt twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("no prompts to draw from")
        self._prompts, self._seed = list(prompts), seed
        self._passes: dict[int, list[Prompt]] = {}  # number of a pass -> its prompts, for the last two passes

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Returns the prompts with the numbers `position` to `position + count - 1`. For example, with 10 prompts in a
        pass, number 10 is the first prompt of the second pass."""
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
    """Mixes the prompts of several orders by weight.

    The share of an order is its weight divided by the sum of all weights. Among the first n prompts, the target number
    for an order is n times its share. The next prompt always comes from the order whose number of prompts is furthest
    below its target number. So in every part of the run, the number of prompts from each order is in proportion to the
    order's weight. The only state is the position, as in PromptOrder.

    Args:
        weights: one positive number per order.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        self._orders, self._shares = list(orders), [weight / sum(weights) for weight in weights]
        self._drawn = [0] * len(orders)  # number of prompts drawn from each order
        # Number of the order, and position in that order, for each position. Arrays need far less memory than tuples.
        self._chosen, self._places = array("I"), array("Q")

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Returns the prompts with the numbers `position` to `position + count - 1`."""
        while len(self._places) < position + count:
            total = len(self._places) + 1
            behind = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
            chosen = behind.index(max(behind))
            self._chosen.append(chosen)
            self._places.append(self._drawn[chosen])
            self._drawn[chosen] += 1
        wanted = slice(position, position + count)
        places = zip(self._chosen[wanted], self._places[wanted], strict=True)
        return [prompt for order, place in places for prompt in self._orders[order].prompts_at(place, 1)]
