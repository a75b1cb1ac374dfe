"""Reward `genrm`: a judge grades the answer and a teacher's reference. The value is computed from both grades."""

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
"""The highest grade. The lowest grade is 0."""
SCALE = 2.0

SHOWN = frozenset({"question", "response_a", "response_b"})
"""Variables of the judge's prompt, in addition to `rules`."""

Grade = Annotated[float, Field(ge=0, le=BEST, allow_inf_nan=False)]


class Comparison(Verdict):
    grade_a: Grade
    grade_b: Grade


@reward("genrm", timeout_s=600, needs="reference")
class GenRM:
    """A generative reward model compares answer and reference, gives reasons, then grades both from 0 to 10.

    The judge makes two comparisons, one with the answer first and one with the reference first. The two grades of
    each text are averaged, so that it does not matter whether the judge prefers the first or the second text. s_answer
    and s_reference are these averages. `length_control` may lower s_answer, but not below 0. `rule` selects the formula
    of the value:

        bradley_terry   1 / (1 + exp(-(s_answer - s_reference) / scale))     the chance that the answer wins
        linear          1/2 + (s_answer - s_reference) / 20

    endpoint     the judge. It sees the question (with pictures, if it takes pictures) and both texts. It is not told
                 which text is the answer
    rule, scale  see above. `scale` is used only by bradley_terry. It is in units of the grades; the default is 2
    temperature  the judge's sampling temperature
    max_tokens   maximum length of one comparison, including the thinking of a reasoning judge
    max_chars    maximum number of characters of the answer that the judge sees; also the maximum for the reference. The
                 middle of a longer text is cut out: the judge sees a short start and a long end
    template     a Jinja file to use instead of rewards/prompts/genrm.jinja. genrm.jinja lists the variables
    length_control  if the answer is longer than the reference, length_control * log2(length of the answer / length of
                 the reference) is subtracted from s_answer. With 0, the length does not matter

    An empty answer scores 0.0. If the judge refuses the policy's answer or does not finish its reply, the same prompt
    is sent with a harmless answer. If the judge gives a comparison for the harmless answer, the policy's answer also
    scores 0.0. A row without a reference is invalid. In the STEP3-VL report, a model compares the response with a
    teacher's response, gives reasons and returns a fine-grained score. The grades, the criteria, the second comparison
    in the other order and the scale are reconstructions. The formula bradley_terry (Bradley and Terry 1952) and the
    cost of length are taken from the model Step 3.5 Flash.
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
            raise ValueError(f"genrm: scale is {scale:g}, but rule: linear has no scale; remove the scale")
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
        reference = clean(Rollout(row, row.reference or "").answer).strip()  # without the thinking of the teacher
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
        """The answer is response A in the comparison `first`, and response B in the comparison `second`."""
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
        return 0.5 + 0.5 * math.tanh(lead / self.scale / 2)  # the logistic function, in a form that cannot overflow


def over_length(answer: str, reference: str) -> float:
    """Returns log2(length of the answer / length of the reference), in characters; 0 if the answer is shorter."""
    return max(0.0, math.log2(len(answer.strip()) / len(reference)))


def _sign(lead: float) -> int:
    return (lead > 0) - (lead < 0)
