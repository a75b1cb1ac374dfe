"""Final answers that say the same, and the one that most of them say."""

from collections import Counter
from collections.abc import Sequence

from rewards.text import last_boxed


def vote(answer: str) -> str:
    """What an answer (a response without its thinking) votes for: its last `\\boxed{...}`, else all of it; case and
    white space don't count. An empty text votes for nothing."""
    boxed = last_boxed(answer)
    return " ".join((answer if boxed is None else boxed).lower().split())


def majority(votes: Sequence[str]) -> str | None:
    """The most frequent vote; of several the one that was given first. None if nobody voted."""
    given = [one for one in votes if one]
    return Counter(given).most_common(1)[0][0] if given else None
