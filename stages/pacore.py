"""The stage PaCoRe. Each prompt contains pooled answers. Metrics show whether the policy only copies these answers.

Pooled answers are the final answers of earlier attempts at the problem (PaCoRe, arXiv 2601.05593; STEP3-VL-10B report,
3.2.4). The data rows contain these answers, or the current policy generates them (`synthesis.pool: online`).
"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from rewards.voting import majority, vote
from rl.config import Accept, Config, CurationOptions, OptionError, SynthesisOptions
from rl.stop import Stop
from rl.types import Prompt, Rollout, Scored
from rollout.pacore.prompt import draw_messages
from stages.base import Stage, StageTools, room_problem

if TYPE_CHECKING:
    from rollout.chat import Chat

REFERENCE = re.compile(
    r"\b(?:answers?|attempts?|messages?|references?|responses?|solutions?)\W{0,3}(\d+(?:\s*(?:,|and|&)\s*\d+)*)", re.I
)
SHORTEST_QUOTE = 3  # minimum length of a quoted answer; a shorter answer, such as a digit, is often found by chance


class Pacore(Stage):
    """Trains on prompts with pooled answers. All defaults except critic_minibatches are from the STEP3-VL-10B
    report."""

    name = "pacore"
    defaults: ClassVar[Mapping[str, Any]] = {
        "iterations": 500,
        "prompts_per_iteration": 64,
        "rollouts_per_prompt": 16,
        "max_sequence_length": 65_536,
        "ppo": {"minibatches": 1, "critic_minibatches": 1},
    }
    selection = "has a pool_accuracy between synthesis.accuracy_over and synthesis.accuracy_under"
    comparable_evaluation = False  # held-out prompts contain pooled answers

    @classmethod
    def option_problems(cls, config: Config) -> Iterable[OptionError]:
        """Refuses options that would make the training off-policy. In the STEP3-VL-10B report, each iteration is one
        optimizer step on samples of the current weights."""
        why = "trains on samples from older weights, but the stage pacore is strictly on-policy"
        if config.ppo.minibatches != 1:
            yield OptionError("ppo.minibatches", f"= {config.ppo.minibatches} {why}; set 1")
        if config.rollout.max_staleness:
            yield OptionError("rollout.max_staleness", f"= {config.rollout.max_staleness} {why}; set 0")
        if config.rollout.partial:
            yield OptionError("rollout.partial", f"{why}; leave it out")

    @classmethod
    def curation_problem(cls, config: Config, curation: CurationOptions) -> str | None:
        least = config.synthesis.least_messages
        if not _cached(config) or ("difficulty" in curation.filters and curation.difficulty.rollouts >= least):
            return None
        return (
            f"the stage pacore needs {least} messages in each row. The filter difficulty makes these messages: add "
            "difficulty to curate.filters, and set curate.difficulty.rollouts to at least this number"
        )

    @classmethod
    def before_curation(cls, config: Config) -> Config:
        """Returns the config with `pool: online`, because the rows have no pools before the curation."""
        return config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"pool": "online"})})

    @classmethod
    def row_problem(cls, prompt: Prompt, config: Config, chat: "Chat", *, trains: bool) -> str | None:
        options = config.synthesis
        if trains and _cached(config) and len(prompt.messages_pool) < options.least_messages:
            return (
                f"its messages_pool has {len(prompt.messages_pool)} messages, but synthesis.least_messages is "
                f"{options.least_messages}; make pools with python -m stages.curate, or set synthesis.pool: online"
            )
        if _cached(config) and prompt.messages_pool:
            tokens = longest_with_messages(prompt, chat, options.most_messages)
            return room_problem(tokens, f"pictures and {options.most_messages} messages", config)
        if not _cached(config) and options.online_length and (own := chat.length(prompt)) >= options.online_length:
            return f"its {own} tokens leave no room for an attempt in synthesis.online_length {options.online_length}"
        return super().row_problem(prompt, config, chat, trains=trains)

    @classmethod
    def selects(cls, prompt: Prompt, config: Config) -> bool:
        return not _cached(config) or within_bounds(config.synthesis, prompt.pool_accuracy)

    @classmethod
    def plan_lines(cls, config: Config, left_out: int = 0) -> list[str]:
        options, outside = config.synthesis, f"; {left_out} rows are outside the accuracy bounds" if left_out else ""
        source = "the rows' pools" if _cached(config) else f"{options.online_rollouts} new attempts at each prompt"
        return [f"messages   {options.least_messages} to {options.most_messages} of {source}{outside}"]

    def __init__(self, tools: StageTools) -> None:
        super().__init__(tools)
        self.options, self.accept, self.seed = tools.config.synthesis, tools.config.accept, tools.config.seed

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Draws pooled answers for this iteration and adds them to each prompt. With an online pool, a prompt is left
        out if it has too few new answers, or if the accuracy of these answers is outside the bounds. Raises Stop if no
        prompt remains."""
        if _cached(self.tools.config):
            return [self._showing(p, f"{iteration}/{place}") for place, p in enumerate(prompts)]
        least = self.options.least_messages
        usable = [
            p
            for p in self.with_new_pools(prompts, iteration)
            if len(p.messages_pool) >= least and within_bounds(self.options, p.pool_accuracy)
        ]
        if not usable:
            raise Stop(
                f"iteration {iteration}: no prompt has {least} new messages whose accuracy is between "
                f"synthesis.accuracy_over = {self.options.accuracy_over} and synthesis.accuracy_under = "
                f"{self.options.accuracy_under}. The policy gives too few final answers, or the rows are too easy or "
                "too hard for it now. Loosen the bounds, allow longer responses, or use other rows",
                saves=True,
            )
        return [self._fitting(self._showing(p, f"{iteration}/{place}")) for place, p in enumerate(usable)]

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Adds pooled answers to each prompt. With a cached pool, every evaluation uses the same answers. A prompt
        without a pool stays unchanged."""
        pooled = prompts if _cached(self.tools.config) else self.with_new_pools(prompts, 0)
        return [self._fitting(self._showing(p, "held out")) for p in pooled]

    def with_new_pools(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Samples new answers to each prompt with the current policy. The new answers become the pool of the prompt."""
        count = self.options.online_rollouts
        scored = self.tools.sample_and_score(prompts, count, iteration)
        groups = [scored[start : start + count] for start in range(0, len(scored), count)]
        return [
            with_pool(p, [s for s in group if s.invalid is None], self.accept, self.tools.chat.reserved)
            for p, group in zip(prompts, groups, strict=True)
        ]

    def _showing(self, prompt: Prompt, draw: str) -> Prompt:
        """Draws pooled answers and adds them to the prompt. The recipe sets the minimum and the maximum number of
        answers. If the pool has fewer answers than the minimum, all of them are added.

        Args:
            draw: the name of this draw. The seed of the draw is made from this name.
        """
        if not prompt.messages_pool:
            return prompt
        least = min(self.options.least_messages, len(prompt.messages_pool))
        return draw_messages(prompt, least, self.options.most_messages, f"{self.seed}/pacore/{draw}/{prompt.id}")

    def _fitting(self, prompt: Prompt) -> Prompt:
        """Removes pooled answers from the prompt, starting with the last one, until the prompt leaves room for a
        response."""
        longest = self.tools.config.max_sequence_length
        while prompt.shown and prompt.shown.texts and self.tools.chat.length(prompt) >= longest:
            accepted = prompt.shown.accepted
            shown = replace(prompt.shown, texts=prompt.shown.texts[:-1], accepted=accepted and accepted[:-1])
            prompt = replace(prompt, shown=shown)
        return prompt

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return synthesis_metrics(scored, self.accept)


def _cached(config: Config) -> bool:
    """True if the rows contain the pooled answers, False if the current policy generates them."""
    return config.synthesis.pool == "cached"


def within_bounds(options: SynthesisOptions, accuracy: float | None) -> bool:
    """True if a pool's accuracy is within the recipe's bounds. If the accuracy is unknown, the result is True only if
    the recipe sets no bounds."""
    if options.accuracy_over is None and options.accuracy_under is None:
        return True
    over = -1.0 if options.accuracy_over is None else options.accuracy_over
    under = 2.0 if options.accuracy_under is None else options.accuracy_under
    return accuracy is not None and over < accuracy < under


def with_pool(prompt: Prompt, scored: Sequence[Scored], accept: Accept, reserved: Sequence[str]) -> Prompt:
    """Returns the prompt with a new pool: the final answers of the attempts `scored`.

    Two kinds of responses are left out. A response of the first kind was cut while thinking, so it has no final answer.
    In a response of the second kind, the answer contains the text of a control token (`reserved`). The tokenizer would
    convert this text into the control token.
    """
    usable = [s for s in scored if s.rollout.answer and not any(token in s.rollout.answer for token in reserved)]
    correct = tuple(is_accepted(s, accept) for s in usable)
    return replace(
        prompt,
        messages_pool=tuple(s.rollout.answer for s in usable),
        pool_accepted=correct,
        pool_accuracy=sum(correct) / len(correct) if correct else None,
    )


def is_accepted(scored: Scored, accept: Accept) -> bool:
    """True if the reward of a response is so high that the response counts as correct."""
    return accept.takes(scored.rollout.prompt.task, scored.reward)


def longest_with_messages(prompt: Prompt, chat: "Chat", most: int) -> int:
    """Adds the `most` longest messages of the pool to the prompt, and returns the number of tokens of this long prompt.
    If the pool has fewer than `most` messages, all of them are added."""
    by_length = sorted(prompt.messages_pool, key=lambda text: len(chat.tokenizer(text).input_ids), reverse=True)
    longest = replace(prompt, messages_pool=tuple(by_length[:most]), pool_accepted=())
    return chat.length(draw_messages(longest, len(longest.messages_pool), most, "all of them"))


# Metrics

SHARES: Mapping[str, Callable[[float], bool]] = {
    "none": lambda share: share == 0,
    "under_half": lambda share: 0 < share < 0.5,
    "half_or_more": lambda share: share >= 0.5,
}


def synthesis_metrics(scored: Sequence[Scored], accept: Accept) -> dict[str, float]:
    """Returns the `pacore/*` metrics of responses to prompts with pooled answers. Leaves out a metric if there is no
    sample from which it can be computed."""
    seen = [s for s in scored if s.invalid is None and s.rollout.prompt.shown and s.rollout.prompt.shown.texts]
    if not seen:
        return {}
    found = {
        "prompts": [float(len({s.rollout.prompt.id for s in seen}))],
        "messages_mean": [float(len(_texts(s.rollout))) for s in seen],
        "accuracy": [float(is_accepted(s, accept)) for s in seen],
        "repeats_majority": [float(repeats_majority(s.rollout)) for s in seen],
        "referred_fraction": [referred_fraction(s.rollout) for s in seen],
    }
    known = [(s, share) for s in seen if (share := message_accuracy(s.rollout.prompt)) is not None]
    found["message_accuracy"] = [share for _, share in known]
    for name, fits in SHARES.items():
        found[f"accuracy/{name}"] = [float(is_accepted(s, accept)) for s, share in known if fits(share)]
    return {f"pacore/{name}": statistics.fmean(values) for name, values in found.items() if values}


def message_accuracy(prompt: Prompt) -> float | None:
    """Returns the share of the prompt's pooled answers that are correct, or None if this share is unknown."""
    if prompt.shown is None or not prompt.shown.accepted:
        return None
    return statistics.fmean(prompt.shown.accepted)


def repeats_majority(rollout: Rollout) -> bool:
    """True if the final answer of the response equals the majority vote of the pooled answers in the prompt."""
    return vote(rollout.answer) == majority([vote(text) for text in _texts(rollout)])


def referred_fraction(rollout: Rollout) -> float:
    """Returns the share of the prompt's pooled answers that a response refers to. A response refers to an answer if it
    gives the number of the answer ("Answer 3", "references 2 and 5"), or if its reasoning quotes the answer."""
    numbers = {int(n) for found in REFERENCE.findall(rollout.text) for n in re.findall(r"\d+", found)}
    thinking = " ".join(rollout.reasoning.lower().split())
    votes = [vote(text) for text in _texts(rollout)]
    quoted = [len(text) >= SHORTEST_QUOTE and text in thinking for text in votes]
    return statistics.fmean(n in numbers or quote for n, quote in enumerate(quoted, start=1))


def _texts(rollout: Rollout) -> tuple[str, ...]:
    return rollout.prompt.shown.texts if rollout.prompt.shown else ()
