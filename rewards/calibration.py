"""Behaviour penalty `calibration`: a judge decides whether the answer claims more certainty than is justified."""

from rewards import Rollout, Score, penalty
from rewards.endpoint import EndpointName
from rewards.judge import Finding, Judge, MaxChars, MaxTokens, offence, question


class Certainty(Finding):
    overconfident: bool

    @property
    def offends(self) -> bool:
        return self.overconfident


@penalty("calibration", timeout_s=600)
class Calibration:
    """1.0 for an answer that the judge calls overconfident, else 0.0.

    endpoint    the judge. It sees the question (with pictures, if it takes pictures), the reasoning and the answer
    max_tokens  maximum length of one verdict, including the thinking of a reasoning judge
    max_chars   maximum number of characters of the answer that the judge sees; also the maximum for the reasoning. The
                middle of a longer text is cut out: the judge sees a short start and a long end

    An empty answer gets 0.0. If the judge refuses the policy's answer or does not finish its reply, the same prompt is
    sent with a harmless answer. If the judge gives a verdict on the harmless answer, the policy's answer gets 1.0. In
    the STEP3-VL report, the training suppresses "unjustified certainty". The report publishes no prompt and no
    magnitude. The prompt is a reconstruction.
    """

    def __init__(self, endpoint: EndpointName, max_tokens: MaxTokens = 2048, max_chars: MaxChars = 16_000):
        self.judge = Judge(endpoint, "calibration.jinja", Certainty, max_tokens=max_tokens, max_chars=max_chars)

    def setup(self) -> None:
        self.judge.setup({"question", "reasoning", "answer"})

    async def __call__(self, rollout: Rollout) -> Score:
        written = {"answer": rollout.answer, "reasoning": rollout.reasoning}
        return await offence(self.judge, rollout.prompt, {"question": question(rollout.prompt)}, written)
