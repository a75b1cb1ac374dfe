"""Helpers for tests of rewards that ask a judge: a scripted judge, samples, and a parser of the judge's prompt."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rewards import Rollout, Score, get
from rewards.endpoint import EndpointSpec, configure
from rl.types import Picture, Prompt
from tests.support.judge_server import JudgeServer, Script, judge_server, text_of

MEGABYTE = 1 << 20
RIGHT = {"reasoning": "Same.", "verdict": "correct"}
WRONG = {"reasoning": "Another number.", "verdict": "incorrect"}
QUESTION = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is 6 times 7?"}]},)


def rollout(text: str, truth: Any = "42", reference: str | None = "It is 42.", images: tuple[Picture, ...] = ()):
    return Rollout(Prompt("row-1", "t", QUESTION, images, ground_truth=truth, reference=reference), text)


@contextmanager
def judging(script: Script | list[Any], **options: Any) -> Iterator[JudgeServer]:
    settings: dict[str, Any] = {"retries": 1, **options}
    with judge_server(script) as server:
        configure({"judge": EndpointSpec("judge", server.url, "m", **settings)})
        yield server


def score(target: str, *rollouts: Rollout | Prompt, **params: Any) -> Any:
    """Scores all rollouts at the same time, with one reward instance. Rows can take the place of rollouts. Returns one
    Score for a single rollout, else a list of Scores."""

    async def all_of_them() -> list[Score]:
        bound = get(target, {"endpoint": "judge", **params})
        return await asyncio.gather(*map(bound, rollouts))

    scores = asyncio.run(all_of_them())
    return scores if len(scores) > 1 else scores[0]


def blocks(prompt: str) -> dict[str, str]:
    """Splits a judge's prompt into its marked blocks of text. Returns label -> text between the marks."""
    nonce = re.findall(r"⟦answer ([0-9a-f]{16})⟧ and ⟦end of answer \1⟧", prompt)
    assert len(nonce) == 1
    found = re.findall(rf"⟦([a-z ]+) {nonce[0]}⟧\n(.*?)\n⟦end of \1 {nonce[0]}⟧", prompt, re.DOTALL)
    assert len(found) == len(dict(found))
    return dict(found)


def honest(request: dict[str, Any]) -> dict[str, Any]:
    """A script for a judge. The judge calls an answer right if the answer's last word equals the ground truth."""
    shown = blocks(text_of(request))
    return RIGHT if shown["answer"].split()[-1] == shown["truth"] else WRONG
