"""Inference with SeRe (one trajectory) or PaCoRe (many trajectories in parallel, then a synthesis of their answers).

In PaCoRe (arXiv 2601.05593), every round except the last one samples several trajectories. Only the final answers of
these trajectories are put into the prompts of the next round, as messages (compaction). The last round is one
trajectory, the synthesis. A plan gives the number of trajectories of each round before the synthesis. The plan in the
STEP3-VL-10B report is `(16,)`: 16 trajectories, then the synthesis. The plan `()` is SeRe.
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
MAX_TRAJECTORIES = 4096  # maximum in one round; parse_plan refuses a larger number, which is probably a typing error


class PromptTooLong(Exception):
    """The prompt leaves no room for a response."""


@dataclass(frozen=True)
class Reply:
    """One response of a model, including its thinking."""

    text: str
    finish: Finish
    tokens: int  # number of sampled tokens
    prompt_tokens: int

    @property
    def message(self) -> str:
        """The final answer, or "" if the response was cut before its final answer."""
        cut = self.finish == "length" and THINK_CLOSE not in self.text
        return "" if cut else answer_of(self.text)


class Sampler(Protocol):
    """Samples `count` responses to a chat.

    Raises: PromptTooLong.
    """

    def __call__(self, chat: Chat, seed: int, urgency: int, count: int = 1) -> Coroutine[Any, Any, list[Reply]]:
        """Samples the responses. Waiting requests with a higher `urgency` are sent first."""
        ...


@dataclass(frozen=True)
class Round:
    """The trajectories of one round. The prompts of all these trajectories contain the same number of messages."""

    replies: tuple[Reply, ...]
    shown: int = 0  # number of messages in the prompt of each trajectory
    left_out: int = 0  # number of messages of the previous round that did not fit into the prompt

    @property
    def messages(self) -> tuple[str, ...]:
        """The final answers of the trajectories. Trajectories without a final answer are left out."""
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
        """The number of tokens sampled in all rounds together."""
        return sum(reply.tokens for one_round in self.rounds for reply in one_round.replies)


def parse_plan(text: str) -> tuple[int, ...]:
    """Converts a text such as `16` or `32,4` into the number of trajectories of each round before the synthesis.

    Raises: ValueError.
    """
    try:
        plan = tuple(int(part) for part in text.split(","))
    except ValueError:
        plan = ()
    if not plan or not all(0 < count <= MAX_TRAJECTORIES for count in plan):
        raise ValueError(
            f"{text!r} is not a plan of trajectories; write the number of trajectories per round, such as 16 or 32,4"
        )
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
        plan: the number of trajectories of each round before the last round; () is SeRe.
        seed: a text that identifies the problem. The seed of every trajectory is derived from this text.
        answers: the number of replies in the last round. An evaluation may use several replies. 0 means that there is
            no last round.
        first_rounds: rounds from an earlier run. They are used in place of the rounds of `plan`.
    Raises: PromptTooLong if the problem leaves no room for a response, even without messages.
    """
    rounds = tuple(first_rounds) or await sample_trajectories(chat, plan, sample, synthesis, seed)
    if not answers:
        return PacoreResult(rounds)
    messages = rounds[-1].messages if rounds else ()
    return PacoreResult((*rounds, await _round(chat, messages, answers, len(rounds), sample, synthesis, seed)))


async def sample_trajectories(
    chat: Chat, plan: Sequence[int], sample: Sampler, synthesis: SynthesisPrompt, seed: str
) -> tuple[Round, ...]:
    """Samples all rounds before the synthesis."""
    rounds: list[Round] = []
    for number, count in enumerate(plan):
        messages = rounds[-1].messages if rounds else ()
        rounds.append(await _round(chat, messages, count, number, sample, synthesis, seed))
    return tuple(rounds)


async def _round(
    chat: Chat, messages: Sequence[str], count: int, number: int, sample: Sampler, synthesis: SynthesisPrompt, seed: str
) -> Round:
    """Samples `count` trajectories. Without messages, one request samples all trajectories. With messages, each
    trajectory sees the messages in its own random order. Messages that do not fit into the prompt are left out."""

    async def attempt(shown: int) -> list[Reply]:
        if not shown:
            return await sample(chat, seed_of(seed, number), number, count)
        orders = [draw_order(len(messages), shown, f"{seed}/{number}/{n}") for n in range(count)]
        prompts = [synthesis.with_messages(chat, [messages[place] for place in order]) for order in orders]
        return await _gather(sample(p, seed_of(seed, number, n), number) for n, p in enumerate(prompts))

    replies, shown = await fit_messages(len(messages), attempt)
    return Round(tuple(replies), shown, len(messages) - shown)


async def fit_messages(messages: int, attempt: Callable[[int], Awaitable[Result]]) -> tuple[Result, int]:
    """Calls `attempt` with the number of messages that the prompt should contain. In the first call, this number is
    `messages`. After each PromptTooLong, `attempt` is called again with a smaller number.

    Returns the result of `attempt`, and the number of messages in the prompt that was short enough. Raises
    PromptTooLong if the prompt is too long even without messages.
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
    """Returns the replies to all requests, in the order of the requests. After an error, all other requests are
    cancelled."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return [reply for replies in await asyncio.gather(*tasks) for reply in replies]
    finally:
        for task in tasks:
            task.cancel()


def draw_order(messages: int, shown: int, seed: str) -> list[int]:
    """Draws the messages that the prompt of one trajectory contains. Returns their indices: `shown` different numbers
    from 0 to `messages - 1`, in random order."""
    return random.Random(seed).sample(range(messages), shown)
