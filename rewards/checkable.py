"""Row judge `checkable`: decides whether a problem has one result that can be checked, and whether the ground truth is
right."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rewards import Prompt, Score, row_judge
from rewards.endpoint import EndpointName
from rewards.judge import REASON_CHARS, Judge, MaxTokens, Verdict, question, truth

UNLIMITED = 1_000_000  # characters per text; no text is cut, because the judge sees no text of the policy


class BareValidity(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["valid", "invalid"]


class Validity(Verdict):
    verdict: Literal["valid", "invalid"]


@row_judge("checkable", timeout_s=600)
class Checkable:
    """1.0 if the judge calls the row's problem and ground truth valid, else 0.0.

    `python -m stages.curate` uses this row judge, in one or more passes over the rows.

    endpoint     the judge. It sees the question (with pictures, if it takes pictures) and the ground truth
    vote         the number of the pass; each pass has a different seed
    reasons      True: the judge gives reasons before its verdict
    temperature  the judge's sampling temperature
    max_tokens   maximum length of one verdict, including the thinking of a reasoning judge
    template     a Jinja file to use instead of rewards/prompts/checkable.jinja. checkable.jinja lists the variables

    In the STEP3-VL report, GPT-OSS-120B makes four passes per prompt. The report does not publish the judge's prompt.
    In the PaCoRe paper, the judge is asked whether problem and answer are valid. The prompt here is a reconstruction.
    """

    def __init__(
        self,
        endpoint: EndpointName,
        vote: Annotated[int, Field(ge=0)] = 0,
        reasons: bool = True,
        temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        max_tokens: MaxTokens = 2048,
        template: str | None = None,
    ):
        self.vote, self.reasons = vote, reasons
        self.judge: Judge[Validity | BareValidity] = Judge(
            endpoint,
            Path(template).absolute() if template else "checkable.jinja",
            Validity if reasons else BareValidity,
            max_tokens=max_tokens,
            max_chars=UNLIMITED,
            temperature=temperature,
        )

    def setup(self) -> None:
        self.judge.setup({"question", "truth"}, {"reasons", "hidden"})

    async def __call__(self, row: Prompt) -> Score:
        hidden = bool(row.images) and not self.judge.endpoint.spec.images
        shown = {"question": question(row), "truth": truth(row), "reasons": self.reasons, "hidden": hidden}
        verdict = await self.judge.ask(row, shown, {}, self.vote)
        details = {"reason": verdict.reasoning[:REASON_CHARS]} if isinstance(verdict, Validity) else {}
        return Score(float(verdict.verdict == "valid"), details)
