"""Reward `exact`: 1.0 if the answer and the ground truth are the same text after normalisation, else 0.0."""

from rewards import Invalid, Rollout, Score, reward
from rewards.text import WINDOW, marked_answer, normalised


@reward("exact", on_timeout="lowest", verifiable=lambda truth: str(truth))
def exact(rollout: Rollout) -> Score:
    """1.0 for equal texts, else 0.0. Letter case, the amount of white space and one final period do not matter.

    Only one part of the answer is compared: the last `\\boxed{...}` if there is one, else the text after the last
    "Answer:", else the whole answer. The ground truth is text or a number.
    """
    truth = rollout.prompt.ground_truth
    if not isinstance(truth, str | int | float) or not normalised(str(truth)):
        raise Invalid(f"exact needs text or a number as ground truth; row {rollout.prompt.id} has {truth!r}")
    found = marked_answer(rollout.answer, WINDOW + len(str(truth)))
    if found is None:
        return Score(0.0, {"why": 'a long answer without \\boxed{...} and without "Answer:"'})
    return Score(float(normalised(found) == normalised(str(truth))), {"answer": found[:200]})
