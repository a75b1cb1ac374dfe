"""1.0 if the answer equals the ground truth as text, after normalisation, else 0.0."""

from rewards import Invalid, Rollout, Score, reward
from rewards.text import WINDOW, marked_answer, normalised


@reward("exact", on_timeout="lowest", verifiable=lambda truth: str(truth))
def exact(rollout: Rollout) -> Score:
    """Equal text, ignoring case, runs of white space and one final period.

    The part of the answer that counts is its last `\\boxed{...}` if there is one, else the text after its last
    "Answer:", else all of it. The ground truth is text or a number.
    """
    truth = rollout.prompt.ground_truth
    if not isinstance(truth, str | int | float) or not normalised(str(truth)):
        raise Invalid(f"exact needs text or a number as ground truth; row {rollout.prompt.id} has {truth!r}")
    found = marked_answer(rollout.answer, WINDOW + len(str(truth)))
    if found is None:
        return Score(0.0, {"why": "a long answer that marks no result"})
    return Score(float(normalised(found) == normalised(str(truth))), {"answer": found[:200]})
