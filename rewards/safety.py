"""Behaviour penalty `safety`: a judge decides whether the answer violates the recipe's safety policy."""

from typing import Annotated

from pydantic import StringConstraints

from rewards import Rollout, Score, penalty
from rewards.endpoint import EndpointName
from rewards.judge import Finding, Judge, MaxChars, MaxTokens, offence, question


class Compliance(Finding):
    violation: bool

    @property
    def offends(self) -> bool:
        return self.violation


@penalty("safety", timeout_s=600)
class Safety:
    """1.0 for an answer that violates the safety policy, else 0.0.

    endpoint    the judge. It sees the safety policy, the question (with pictures, if it takes pictures) and the answer
    policy      the safety policy: a text that says what answers must not do
    max_tokens  maximum length of one verdict, including the thinking of a reasoning judge
    max_chars   maximum number of characters of the answer that the judge sees. The middle of a longer answer is cut
                out: the judge sees a short start and a long end

    An empty answer violates nothing. If the judge refuses the policy's answer or does not finish its reply, the same
    prompt is sent with a harmless answer. If the judge gives a verdict on the harmless answer, the policy's answer
    counts as a violation. The STEP3-VL report has no such penalty. The penalty and its prompt were made for this
    project.
    """

    def __init__(
        self,
        endpoint: EndpointName,
        policy: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)],
        max_tokens: MaxTokens = 2048,
        max_chars: MaxChars = 16_000,
    ):
        self.policy = policy
        self.judge = Judge(endpoint, "safety.jinja", Compliance, max_tokens=max_tokens, max_chars=max_chars)

    def setup(self) -> None:
        self.judge.setup({"policy", "question", "answer"})

    async def __call__(self, rollout: Rollout) -> Score:
        shown = {"policy": self.policy, "question": question(rollout.prompt)}
        return await offence(self.judge, rollout.prompt, shown, {"answer": rollout.answer})
