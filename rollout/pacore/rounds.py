"""Inference by SeRe (one trajectory) or PaCoRe (many in parallel, whose final answers a last trajectory synthesises).

PaCoRe (arXiv 2601.05593): every round samples several trajectories. Only their final answers (compaction) go into the
prompts of the next round, as messages. The last round is one trajectory, the synthesis. The plan of
STEP3-VL-10B's report is `(16,)`: 16 trajectories, then the synthesis. The plan `()` is SeRe.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rl.types import THINK_CLOSE, Finish, answer_of
from rollout.pacore.prompt import Chat, SynthesisPrompt
from rollout.pool import seed_of

Result = TypeVar("Result")
MAX_TRAJECTORIES = 4096  # of a round; a larger number is a typing error


class PromptTooLong(Exception):
    """The prompt leaves no room for a response."""


@dataclass(frozen=True)
class Reply:
    """One response of a model, thinking included."""

    text: str
    finish: Finish
    tokens: int  # sampled
    prompt_tokens: int

    @property
    def message(self) -> str:
        """The final answer; "" if the response was cut before it."""
        cut = self.finish == "length" and THINK_CLOSE not in self.text
        return "" if cut else answer_of(self.text)


class Sampler(Protocol):
    """Samples `count` responses to a chat.

    Raises: PromptTooLong.
    """

    def __call__(self, chat: Chat, seed: int, urgency: int, count: int = 1) -> Coroutine[Any, Any, list[Reply]]:
        """`urgency`: waiting requests with a higher urgency are sent first."""
        ...


@dataclass(frozen=True)
class Round:
    """Trajectories that were shown the same number of messages."""

    replies: tuple[Reply, ...]
    shown: int = 0  # messages in the prompt of each trajectory
    left_out: int = 0  # messages of the previous round for which there was no room

    @property
    def messages(self) -> tuple[str, ...]:
        """The final answers of the trajectories that have one."""
        return tuple(reply.message for reply in self.replies if reply.message)


@dataclass(frozen=True)
class PacoreResult:
    """All rounds of a problem. The first reply of the last round is the answer."""

    rounds: tuple[Round, ...]

    @property
    def reply(self) -> Reply:
        return self.rounds[-1].replies[0]

    @property
    def tokens(self) -> int:
        """The number of tokens that all rounds sampled."""
        return sum(reply.tokens for one_round in self.rounds for reply in one_round.replies)


def parse_plan(text: str) -> tuple[int, ...]:
    """Returns the number of trajectories of each round before the synthesis, from a text such as `16` or `32,4`.

    Raises: ValueError.
    """
    try:
        plan = tuple(int(part) for part in text.split(","))
    except ValueError:
        plan = ()
    if not plan or not all(0 < count <= MAX_TRAJECTORIES for count in plan):
        raise ValueError(f"{text!r} is not a plan of trajectories; write the number of each round, as in 16 or 32,4")
    return plan


async def run_rounds(
    chat: Chat,
    plan: Sequence[int],
    sample: Sampler,
    synthesis: SynthesisPrompt,
    seed: str,
    *,
    answers: int = 1,
    first_rounds: Sequence[Round] = (),
) -> PacoreResult:
    """Samples all rounds of a problem.

    Args:
        plan: the number of trajectories of each round before the last; () is SeRe.
        seed: identifies the problem; the seed of every trajectory is derived from it.
        answers: the number of replies of the last round: more than one for an evaluation, 0 for no last round.
        first_rounds: rounds from an earlier run, used instead of those of `plan`.
    Raises: PromptTooLong if the problem alone leaves no room for a response.
    """
    rounds = tuple(first_rounds) or await sample_trajectories(chat, plan, sample, synthesis, seed)
    if not answers:
        return PacoreResult(rounds)
    messages = rounds[-1].messages if rounds else ()
    return PacoreResult((*rounds, await _round(chat, messages, answers, len(rounds), sample, synthesis, seed)))


async def sample_trajectories(
    chat: Chat, plan: Sequence[int], sample: Sampler, synthesis: SynthesisPrompt, seed: str
) -> tuple[Round, ...]:
    """Samples the rounds before the synthesis."""
    rounds: list[Round] = []
    for number, count in enumerate(plan):
        messages = rounds[-1].messages if rounds else ()
        rounds.append(await _round(chat, messages, count, number, sample, synthesis, seed))
    return tuple(rounds)


async def _round(
    chat: Chat, messages: Sequence[str], count: int, number: int, sample: Sampler, synthesis: SynthesisPrompt, seed: str
) -> Round:
    """Samples `count` trajectories: by one request if there are no messages, else each with an order of its own.
    Messages for which there is no room are left out."""

    async def attempt(shown: int) -> list[Reply]:
        if not shown:
            return await sample(chat, seed_of(seed, number), number, count)
        orders = [draw_order(len(messages), shown, f"{seed}/{number}/{n}") for n in range(count)]
        prompts = [synthesis.with_messages(chat, [messages[place] for place in order]) for order in orders]
        return await _gather(sample(p, seed_of(seed, number, n), number) for n, p in enumerate(prompts))

    replies, shown = await fit_messages(len(messages), attempt)
    return Round(tuple(replies), shown, len(messages) - shown)


async def fit_messages(messages: int, attempt: Callable[[int], Awaitable[Result]]) -> tuple[Result, int]:
    """Calls `attempt` with the number of messages to show, and with fewer as long as it raises PromptTooLong.

    Returns the result and the number of messages shown. Raises PromptTooLong if there is no room even without any.
    """
    shown = messages
    while True:
        try:
            return await attempt(shown), shown
        except PromptTooLong:
            if not shown:
                raise
            shown -= max(1, shown // 10)


async def _gather(requests: Iterable[Coroutine[Any, Any, list[Reply]]]) -> list[Reply]:
    """The replies of all requests, in their order. After the first error the other requests are cancelled."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return [reply for replies in await asyncio.gather(*tasks) for reply in replies]
    finally:
        for task in tasks:
            task.cancel()


def draw_order(messages: int, shown: int, seed: str) -> list[int]:
    """Returns the indices of `shown` out of `messages` messages, in the random order of one trajectory."""
    return random.Random(seed).sample(range(messages), shown)
