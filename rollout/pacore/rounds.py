"""Inference: SeRe, one chain of thought, and PaCoRe, many in parallel whose final answers are read and synthesised.

PaCoRe (arXiv 2601.05593): in every round several trajectories are sampled; only their final answers (compaction) go on
to the next round, as the messages of its prompts; the last round is one trajectory, the synthesis. `(16,)` is the
STEP3-VL-10B report's plan: 16 chains, then the synthesis. `()` is SeRe.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rl.types import THINK_CLOSE, Finish, answer_of
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pool import seed_of

Result = TypeVar("Result")
Turns = Sequence[Mapping[str, Any]]
MOST_TRAJECTORIES = 4096  # of a round; a larger number is a slip of the hand


class TooLong(Exception):
    """The prompt leaves no room for a response."""


@dataclass(frozen=True)
class Reply:
    """What a model said once, thinking included."""

    text: str
    finish: Finish
    tokens: int  # sampled
    prompt_tokens: int

    @property
    def message(self) -> str:
        """Its final answer; "" if it was cut before there was one."""
        cut = self.finish == "length" and THINK_CLOSE not in self.text
        return "" if cut else answer_of(self.text)


class Ask(Protocol):
    """Has a model answer a chat `count` times.

    Raises: TooLong.
    """

    def __call__(self, turns: Turns, seed: int, urgency: int, count: int = 1) -> Coroutine[Any, Any, list[Reply]]:
        """`urgency`: of several that wait, the one with the highest comes first."""
        ...


@dataclass(frozen=True)
class Round:
    """Trajectories that saw the same number of messages."""

    replies: tuple[Reply, ...]
    shown: int = 0  # messages that each of them saw
    left_out: int = 0  # messages of the round before that had no room

    @property
    def messages(self) -> tuple[str, ...]:
        """The final answers of those that came to one."""
        return tuple(reply.message for reply in self.replies if reply.message)


@dataclass(frozen=True)
class PacoreResult:
    """All that was thought about a problem; the last round's first reply is the answer."""

    rounds: tuple[Round, ...]

    @property
    def reply(self) -> Reply:
        return self.rounds[-1].replies[0]

    @property
    def tokens(self) -> int:
        """Sampled in all rounds."""
        return sum(reply.tokens for one in self.rounds for reply in one.replies)


def plan_of(text: str) -> tuple[int, ...]:
    """Trajectories of each round before the synthesis, as in `16` or `32,4`. Raises ValueError."""
    try:
        plan = tuple(int(part) for part in text.split(","))
    except ValueError:
        plan = ()
    if not plan or not all(0 < count <= MOST_TRAJECTORIES for count in plan):
        raise ValueError(f"{text!r} is no plan of trajectories; write how many each round has, as in 16 or 32,4")
    return plan


async def think(
    turns: Turns,
    plan: Sequence[int],
    ask: Ask,
    synthesis: SynthesisPrompt,
    seed: str,
    *,
    answers: int = 1,
    given: Sequence[Round] = (),
) -> PacoreResult:
    """All rounds of a problem.

    Args:
        plan: trajectories of each round before the last; () is SeRe.
        seed: identifies the problem; every trajectory has a seed of its own from it.
        answers: replies of the last round; more than one to measure how good they are, 0 for none.
        given: rounds that are there already, in place of those of the plan.
    Raises: TooLong if the problem alone leaves no room.
    """
    rounds = tuple(given) or await explore(turns, plan, ask, synthesis, seed)
    if not answers:
        return PacoreResult(rounds)
    messages = rounds[-1].messages if rounds else ()
    return PacoreResult((*rounds, await _round(turns, messages, answers, len(rounds), ask, synthesis, seed)))


async def explore(
    turns: Turns, plan: Sequence[int], ask: Ask, synthesis: SynthesisPrompt, seed: str
) -> tuple[Round, ...]:
    """The rounds before the synthesis."""
    rounds: list[Round] = []
    for number, count in enumerate(plan):
        messages = rounds[-1].messages if rounds else ()
        rounds.append(await _round(turns, messages, count, number, ask, synthesis, seed))
    return tuple(rounds)


async def _round(
    turns: Turns, messages: Sequence[str], count: int, number: int, ask: Ask, synthesis: SynthesisPrompt, seed: str
) -> Round:
    """Trajectories with the same messages, each in an order of its own; without messages they are asked for together.
    Messages that have no room are left out."""

    async def attempt(shown: int) -> list[Reply]:
        if not shown:
            return await ask(turns, seed_of(seed, number), number, count)
        orders = [order(len(messages), shown, f"{seed}/{number}/{n}") for n in range(count)]
        prompts = [synthesis.with_messages(turns, [messages[place] for place in one]) for one in orders]
        return await _all(ask(p, seed_of(seed, number, n), number) for n, p in enumerate(prompts))

    replies, shown = await with_room(len(messages), attempt)
    return Round(tuple(replies), shown, len(messages) - shown)


async def with_room(messages: int, attempt: Callable[[int], Awaitable[Result]]) -> tuple[Result, int]:
    """What `attempt` returns when it shows so many messages, or the most that have room, and how many these are.

    Raises TooLong if the problem alone leaves no room.
    """
    shown = messages
    while True:
        try:
            return await attempt(shown), shown
        except TooLong:
            if not shown:
                raise
            shown -= max(1, shown // 10)


async def _all(asked: Iterable[Coroutine[Any, Any, list[Reply]]]) -> list[Reply]:
    """What all say, in this order; the first that fails ends the others, which would be of no use."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return [reply for replies in await asyncio.gather(*tasks) for reply in replies]
    finally:
        for task in tasks:
            task.cancel()


def order(messages: int, shown: int, seed: str) -> list[int]:
    """Which `shown` of so many messages a trajectory sees, in its own order, which `seed` gives."""
    return random.Random(seed).sample(range(messages), shown)
