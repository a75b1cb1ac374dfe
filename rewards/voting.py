"""Majority vote over final answers. Tested in tests/stages/test_pacore.py."""

from collections import Counter
from collections.abc import Sequence

from rewards.answer import last_boxed


def vote(answer: str) -> str:
    """Returns the vote of an answer (a response without its thinking). The vote is the content of the last
    `\\boxed{...}` if there is one, else the whole answer. The vote is converted to lower case, and each sequence of
    white space in it becomes one blank. The vote of an empty answer is ""."""
    boxed = last_boxed(answer)
    return " ".join((answer if boxed is None else boxed).lower().split())


def majority(votes: Sequence[str]) -> str | None:
    """Returns the most frequent non-empty vote; None if there is no vote. If several votes are equally frequent,
    returns the first of them."""
    given = [one for one in votes if one]
    return Counter(given).most_common(1)[0][0] if given else None
