"""The stage PaCoRe: every prompt shows messages of its pool, and metrics tell whether synthesis is more than copying.

Messages are the final answers of earlier attempts at the problem (PaCoRe, arXiv 2601.05593; STEP3-VL-10B's report,
3.2.4). They come with the rows, or with `synthesis.pool: online` from the policy as it is.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rewards.voting import majority, vote
from rl.config import Accept, SynthesisOptions
from rl.stop import Stop
from rl.types import Prompt, Rollout, Scored
from rollout.chat import Chat
from rollout.pacore.prompt import draw_messages

NAMED = re.compile(
    r"\b(?:answers?|attempts?|messages?|references?|responses?|solutions?)\W{0,3}(\d+(?:\s*(?:,|and|&)\s*\d+)*)", re.I
)
SHORTEST_QUOTE = 3  # characters of an answer: a digit stands in many a text without being quoted


class Attempts(Protocol):
    """Sampling and scoring, as the loop does it."""

    def __call__(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]: ...


@dataclass(frozen=True)
class Pacore:
    """A stages.loop.Stage.

    Args:
        attempts: with `pool: online`, who makes new messages: the policy as it is, and the rewards.
    """

    options: SynthesisOptions
    accept: Accept
    seed: int
    chat: Chat
    longest: int  # tokens of prompt and response together, at most
    attempts: Attempts

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Each with messages drawn for this iteration; without those whose fresh messages are too few or outside the
        bounds. Raises Stop if none is left."""
        if self.options.pool == "cached":
            return [self._showing(p, f"{iteration}/{place}") for place, p in enumerate(prompts)]
        pooled = self.fresh(prompts, iteration)
        least = self.options.least_messages
        inside = [p for p in pooled if len(p.messages_pool) >= least and within(self.options, p.pool_accuracy)]
        if not inside:
            raise Stop(
                f"iteration {iteration}: no prompt has {least} fresh messages whose accuracy is within "
                f"synthesis.accuracy_over = {self.options.accuracy_over} and synthesis.accuracy_under = "
                f"{self.options.accuracy_under}: the policy does not come to answers, or the rows are too easy or too "
                "hard for it by now. Loosen the bounds, give more room, or take other rows",
                saves=True,
            )
        return [self._fitting(self._showing(p, f"{iteration}/{place}")) for place, p in enumerate(inside)]

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Each with messages, with cached pools always the same ones; a row without a pool is asked plainly."""
        pooled = prompts if self.options.pool == "cached" else self.fresh(prompts, 0)
        return [self._fitting(self._showing(p, "held out")) for p in pooled]

    def fresh(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """The prompts with pools of new messages by the policy as it is."""
        count = self.options.online_rollouts
        scored = self.attempts(prompts, count, iteration)
        groups = [scored[start : start + count] for start in range(0, len(scored), count)]
        return [
            pooled(p, [s for s in group if s.invalid is None], self.accept, self.chat.reserved)
            for p, group in zip(prompts, groups, strict=True)
        ]

    def _showing(self, prompt: Prompt, name: str) -> Prompt:
        """With as many messages as there may be; a pool that is too small shows all it has."""
        if not prompt.messages_pool:
            return prompt
        least = min(self.options.least_messages, len(prompt.messages_pool))
        return draw_messages(prompt, least, self.options.most_messages, f"{self.seed}/pacore/{name}/{prompt.id}")

    def _fitting(self, prompt: Prompt) -> Prompt:
        """Without the last of its messages, if they leave no room for a response."""
        while prompt.shown and prompt.shown.texts and self.chat.length(prompt) >= self.longest:
            accepted = prompt.shown.accepted
            shown = replace(prompt.shown, texts=prompt.shown.texts[:-1], accepted=accepted and accepted[:-1])
            prompt = replace(prompt, shown=shown)
        return prompt

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return synthesis_metrics(scored, self.accept)

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {}


def within(options: SynthesisOptions, accuracy: float | None) -> bool:
    """Whether a pool's accuracy is within the recipe's bounds; where there are any, an unknown one is not."""
    if options.accuracy_over is None and options.accuracy_under is None:
        return True
    over = -1.0 if options.accuracy_over is None else options.accuracy_over
    under = 2.0 if options.accuracy_under is None else options.accuracy_under
    return accuracy is not None and over < accuracy < under


def pooled(prompt: Prompt, scored: Sequence[Scored], accept: Accept, reserved: Sequence[str]) -> Prompt:
    """The prompt with the final answers of its attempts as pool.

    A response that was cut while thinking has none, and one that spells a control token of the model (`reserved`) would
    be read as such: neither becomes a message.
    """
    usable = [s for s in scored if s.rollout.answer and not any(word in s.rollout.answer for word in reserved)]
    right = tuple(accepted(s, accept) for s in usable)
    return replace(
        prompt,
        messages_pool=tuple(s.rollout.answer for s in usable),
        pool_accepted=right,
        pool_accuracy=sum(right) / len(right) if right else None,
    )


def accepted(scored: Scored, accept: Accept) -> bool:
    """Whether a response counts as right."""
    return accept.takes(scored.rollout.prompt.task, scored.reward)


def longest_with_messages(prompt: Prompt, chat: Chat, most: int) -> int:
    """Tokens of the prompt with the `most` longest messages of its pool."""
    by_length = sorted(prompt.messages_pool, key=lambda one: len(chat.tokenizer(one).input_ids), reverse=True)
    every = replace(prompt, messages_pool=tuple(by_length[:most]), pool_accepted=())
    return chat.length(draw_messages(every, len(every.messages_pool), most, "all of them"))


# Metrics

SHARES: Mapping[str, Callable[[float], bool]] = {
    "none": lambda share: share == 0,
    "under_half": lambda share: 0 < share < 0.5,
    "half_or_more": lambda share: share >= 0.5,
}


def synthesis_metrics(scored: Sequence[Scored], accept: Accept) -> dict[str, float]:
    """The `pacore/*` metrics of responses to prompts that show messages; those about nothing are left out."""
    seen = [s for s in scored if s.invalid is None and s.rollout.prompt.shown and s.rollout.prompt.shown.texts]
    if not seen:
        return {}
    found = {
        "prompts": [float(len({s.rollout.prompt.id for s in seen}))],
        "messages_mean": [float(len(_texts(s.rollout))) for s in seen],
        "accuracy": [float(accepted(s, accept)) for s in seen],
        "repeats_majority": [float(repeats_majority(s.rollout)) for s in seen],
        "referred_fraction": [referred(s.rollout) for s in seen],
    }
    known = [(s, share) for s in seen if (share := message_accuracy(s.rollout.prompt)) is not None]
    found["message_accuracy"] = [share for _, share in known]
    for name, fits in SHARES.items():
        found[f"accuracy/{name}"] = [float(accepted(s, accept)) for s, share in known if fits(share)]
    return {f"pacore/{name}": statistics.fmean(values) for name, values in found.items() if values}


def message_accuracy(prompt: Prompt) -> float | None:
    """Share of the shown messages that are right, if that is known."""
    if prompt.shown is None or not prompt.shown.accepted:
        return None
    return statistics.fmean(prompt.shown.accepted)


def repeats_majority(rollout: Rollout) -> bool:
    """Whether the final answer is what most of the shown messages say."""
    return vote(rollout.answer) == majority([vote(text) for text in _texts(rollout)])


def referred(rollout: Rollout) -> float:
    """Share of the shown messages that a response refers to: by number ("Answer 3", "references 2 and 5"), or by
    quoting in its thinking what they vote for."""
    numbers = {int(n) for found in NAMED.findall(rollout.text) for n in re.findall(r"\d+", found)}
    thinking = " ".join(rollout.reasoning.lower().split())
    votes = [vote(text) for text in _texts(rollout)]
    quoted = [len(one) >= SHORTEST_QUOTE and one in thinking for one in votes]
    return statistics.fmean(n in numbers or quote for n, quote in enumerate(quoted, start=1))


def _texts(rollout: Rollout) -> tuple[str, ...]:
    return rollout.prompt.shown.texts if rollout.prompt.shown else ()
