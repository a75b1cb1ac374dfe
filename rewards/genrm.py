"""A judge grades the answer and a teacher's reference side by side, in both orders; the lead becomes a value 0 to 1."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rewards import Invalid, Rollout, Score, reward
from rewards.endpoint import EndpointName
from rewards.judge import (
    REASON_CHARS,
    Judge,
    MaxChars,
    MaxTokens,
    Unjudgeable,
    Verdict,
    clean,
    cut,
    empty,
    question,
    together,
)

BEST = 10.0
"""The highest grade; the lowest is 0."""
SCALE = 2.0

SHOWN = frozenset({"question", "response_a", "response_b"})
"""Variables of the judge's prompt, besides `rules`."""

Grade = Annotated[float, Field(ge=0, le=BEST, allow_inf_nan=False)]


class Comparison(Verdict):
    grade_a: Grade
    grade_b: Grade


@reward("genrm", timeout_s=600, needs="reference")
class GenRM:
    """A generative reward model: it compares answer and reference, gives reasons, then grades both from 0 to 10.

    The judge makes two comparisons, one with the answer first and one with the reference first. The two grades of
    each text are averaged, so that a preference for the first (or second) place cancels out. With s the averaged
    grades, and `length_control` subtracted from s_answer:

        bradley_terry   1 / (1 + exp(-(s_answer - s_reference) / scale))     the chance that the answer wins
        linear          1/2 + (s_answer - s_reference) / 20

    endpoint     the judge. It sees the question (with pictures, if it takes pictures) and both texts, but not which of
                 them is the answer
    rule, scale  see above; scale is in grades, 2 unless given, and only for bradley_terry
    temperature  the judge's sampling temperature
    max_tokens   of one comparison, including the thinking of a reasoning judge
    max_chars    characters of the answer and of the reference that are shown: a little of the beginning and most of
                 the end
    template     a Jinja file in place of rewards/prompts/genrm.jinja, which lists the variables
    length_control  grades that an answer loses each time its length doubles over the reference's; 0 ignores length

    An empty answer scores 0.0. So does an answer on which the judge gives no comparison, if it gives one on a harmless
    answer to the same row. A row without reference is invalid. The report has pairwise comparison with a teacher's
    response, reasons and a fine-grained score; grades, criteria, both orders and the scale are reconstructions. The win
    probability (Bradley and Terry 1952), and that length can cost confidence, follow Step 3.5 Flash.
    """

    def __init__(
        self,
        endpoint: EndpointName,
        rule: Literal["bradley_terry", "linear"] = "bradley_terry",
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
        temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        max_tokens: MaxTokens = 4096,
        max_chars: MaxChars = 16_000,
        template: str | None = None,
        length_control: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    ):
        if rule == "linear" and scale is not None:
            raise ValueError(f"genrm: scale is {scale:g}, but rule: linear has none; leave it out")
        self.rule, self.scale, self.max_chars = rule, scale or SCALE, max_chars
        self.length_control = length_control
        self.judge = Judge(
            endpoint,
            Path(template).absolute() if template else "genrm.jinja",
            Comparison,
            max_tokens=max_tokens,
            max_chars=max_chars,
            temperature=temperature,
        )

    def setup(self) -> None:
        self.judge.setup(SHOWN)

    async def __call__(self, rollout: Rollout) -> Score:
        row = rollout.prompt
        reference = clean(Rollout(row, row.reference or "").answer).strip()  # without the teacher's thinking
        if not reference:
            raise Invalid(f"row {row.id} has no reference to compare with")
        if empty(rollout.answer):
            return Score(0.0, {"why": "an empty answer"})
        doublings = over_length(rollout.answer, reference)
        chat, reference = question(row), cut(reference, self.max_chars)
        try:
            first, second = await together(
                self.judge.ask(row, {"question": chat, "response_b": reference}, {"response_a": rollout.answer}),
                self.judge.ask(row, {"question": chat, "response_a": reference}, {"response_b": rollout.answer}),
            )
        except Unjudgeable as e:
            return Score(0.0, {"why": str(e)})
        return self._score(first, second, doublings)

    def _score(self, first: Comparison, second: Comparison, doublings: float) -> Score:
        """`first` is the comparison in which the answer is A, `second` the one in which it is B."""
        answer = (first.grade_a + second.grade_b) / 2
        reference = (first.grade_b + second.grade_a) / 2
        agreed = _sign(first.grade_a - first.grade_b) == _sign(second.grade_b - second.grade_a)
        reasons = [first.reasoning[:REASON_CHARS], second.reasoning[:REASON_CHARS]]
        details = {"answer": answer, "reference": reference, "orders_agree": agreed, "reasons": reasons}
        kept = max(0.0, answer - self.length_control * doublings)
        return Score(self._value(kept - reference), details)

    def _value(self, lead: float) -> float:
        if self.rule == "linear":
            return 0.5 + lead / (2 * BEST)
        return 0.5 + 0.5 * math.tanh(lead / self.scale / 2)  # the logistic function, without overflow


def over_length(answer: str, reference: str) -> float:
    """log2 of the answer's length over the reference's, in characters; 0 for a shorter answer."""
    return max(0.0, math.log2(len(answer.strip()) / len(reference)))


def _sign(lead: float) -> int:
    return (lead > 0) - (lead < 0)
