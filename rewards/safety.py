"""Behaviour penalty: an answer that violates the recipe's policy, in a judge's eyes."""

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
    """1.0 for an answer that violates the policy, else 0.0.

    endpoint    the judge. It sees the policy, the question (with pictures, where it takes them) and the answer
    policy      what answers must not do, in words
    max_tokens  of one verdict, a reasoning judge's thinking included
    max_chars   of the answer that are shown: its beginning and, mostly, its end

    An empty answer violates nothing. One on which the judge gives no verdict, though it gives one on a harmless answer
    to the same row, counts as a violation. The report has no such penalty; policy and prompt are ours.
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
