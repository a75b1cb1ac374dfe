"""Reward `verifier`: 1.0 if a judge finds that the final answer and the ground truth mean the same, else 0.0."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rewards import Rollout, Score, reward
from rewards.endpoint import EndpointName
from rewards.judge import (
    REASON_CHARS,
    Judge,
    MaxChars,
    MaxTokens,
    Unjudgeable,
    Verdict,
    empty,
    question,
    together,
    truth,
)


class AnswerVerdict(Verdict):
    verdict: Literal["correct", "incorrect"]

    @property
    def right(self) -> bool:
        return self.verdict == "correct"


class ProcessVerdict(AnswerVerdict):
    reasoning_supported: bool

    @property
    def right(self) -> bool:
        return super().right and self.reasoning_supported


@reward("verifier", timeout_s=600, needs="ground_truth")
class Verifier:
    """1.0 for an answer that the judge calls correct, else 0.0.

    endpoint     the judge. It sees the question (with pictures, if it takes pictures), the ground truth and the answer
    votes        number of verdicts, which are requested at the same time with different seeds
    rule         "majority": the answer is right if more than half of the verdicts say so. "all": it is right if all
                 verdicts say so
    process      True: the judge also sees the reasoning, and rejects a right answer that the reasoning does not support
    temperature  the judge's sampling temperature. With several votes it must be above 0, so that votes can differ
    max_tokens   maximum length of one verdict, including the thinking of a reasoning judge
    max_chars    maximum number of characters of the answer that the judge sees; also the maximum for the reasoning. The
                 middle of a longer text is cut out: the judge sees a short start and a long end
    template     a Jinja file to use instead of rewards/prompts/verifier.jinja. verifier.jinja lists the variables. The
                 path is absolute, or relative to the folder in which the run is started

    An empty answer scores 0.0. If the judge refuses the policy's answer or does not finish its reply, the same prompt
    is sent with a harmless answer. If the judge gives a verdict on the harmless answer, the policy's answer also scores
    0.0. The STEP3-VL report says that its verifier ignores the form of an answer, accepts equal expressions, and checks
    the consistency of the reasoning. The report publishes no prompt and no number of votes. The prompt and the number
    of votes are reconstructions.
    """

    def __init__(
        self,
        endpoint: EndpointName,
        votes: Annotated[int, Field(ge=1)] = 1,
        rule: Literal["all", "majority"] = "majority",
        process: bool = False,
        temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        max_tokens: MaxTokens = 2048,
        max_chars: MaxChars = 16_000,
        template: str | None = None,
    ):
        if votes > 1 and temperature == 0:
            raise ValueError(
                f"verifier: {votes} votes at temperature 0 are all the same; raise the temperature or set votes: 1"
            )
        self.votes, self.rule, self.process = votes, rule, process
        self.judge: Judge[AnswerVerdict] = Judge(
            endpoint,
            Path(template).absolute() if template else "verifier.jinja",
            ProcessVerdict if process else AnswerVerdict,
            max_tokens=max_tokens,
            max_chars=max_chars,
            temperature=temperature,
        )

    def setup(self) -> None:
        needed = {"question", "truth", "answer", *(["reasoning"] if self.process else [])}
        self.judge.setup(needed, {"reasoning", "process"})

    async def __call__(self, rollout: Rollout) -> Score:
        row = rollout.prompt
        shown = {"question": question(row), "truth": truth(row), "process": self.process}
        if empty(rollout.answer):
            return Score(0.0, {"why": "an empty answer"})
        written = {"answer": rollout.answer, "reasoning": rollout.reasoning}
        try:
            verdicts = await together(*(self.judge.ask(row, shown, written, vote) for vote in range(self.votes)))
        except Unjudgeable as e:
            return Score(0.0, {"why": str(e)})
        return self._counted(verdicts)

    def _counted(self, verdicts: list[AnswerVerdict]) -> Score:
        votes = [verdict.right for verdict in verdicts]
        right = all(votes) if self.rule == "all" else 2 * sum(votes) > len(votes)
        deciding = next(v for v in verdicts if v.right == right)
        return Score(float(right), {"votes": votes, "reason": deciding.reasoning[:REASON_CHARS]})
