"""Row judge `relevant`: a vision-language model grades how closely a row's pictures and question are related."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from rewards import Prompt, Score, row_judge
from rewards.checkable import UNLIMITED
from rewards.endpoint import EndpointName
from rewards.judge import REASON_CHARS, Judge, MaxTokens, Verdict, question

BEST = 10


Points = Annotated[int, Field(ge=0, le=BEST)]


class BareGrade(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    grade: Points


class Grade(Verdict):
    grade: Points


@row_judge("relevant", timeout_s=600)
class Relevant:
    """The judge's grade, from 0.0 (lowest) to 1.0 (highest). Used by `python -m stages.curate`.

    endpoint     the judge, a vision-language model (`images: true` in the recipe). It sees question and pictures
    reasons      True: the judge gives reasons before its grade
    temperature  the judge's sampling temperature
    max_tokens   maximum length of one reply
    template     a Jinja file to use instead of rewards/prompts/relevant.jinja. relevant.jinja lists the variables

    In the STEP3-VL report, an early version of STEP3-VL-10B rates "semantic correlation and mutual contribution between
    images and questions". The report publishes no prompt and no threshold. Prompt and threshold are reconstructions.
    """

    def __init__(
        self,
        endpoint: EndpointName,
        reasons: bool = True,
        temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
        max_tokens: MaxTokens = 1024,
        template: str | None = None,
    ):
        self.reasons = reasons
        self.judge: Judge[Grade | BareGrade] = Judge(
            endpoint,
            Path(template).absolute() if template else "relevant.jinja",
            Grade if reasons else BareGrade,
            max_tokens=max_tokens,
            max_chars=UNLIMITED,
            temperature=temperature,
        )

    def setup(self) -> None:
        self.judge.setup({"question"}, {"reasons"})
        if not self.judge.endpoint.spec.images:
            raise ValueError(
                f"endpoint {self.judge.name} gets no pictures; the row judge relevant needs `images: true`"
            )

    async def __call__(self, row: Prompt) -> Score:
        grade = await self.judge.ask(row, {"question": question(row), "reasons": self.reasons}, {})
        details = {"reason": grade.reasoning[:REASON_CHARS]} if isinstance(grade, Grade) else {}
        return Score(grade.grade / BEST, details)
