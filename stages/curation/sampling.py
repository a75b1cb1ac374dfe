"""Samples responses of the policy to data rows, and scores these responses. Judges can also score the rows.

Each response and each score is stored in `Answers` when it arrives. Stored results are not computed again.

Tested in tests/stages/curation/test_filters.py.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rl.stop import Stop
from rl.types import Completion, Prompt, Request, Rollout, RowScore, Scored
from rollout.chat import Chat
from rollout.pool import seed_of
from stages.curation.answers import Answers
from stages.curation.judges import pass_name
from stages.loop import AnyScore, require_valid

ENOUGH_TO_JUDGE = 24  # with fewer scores, a few invalid scores do not prove that the reward fails
Record = Mapping[str, Any]
Item = TypeVar("Item", Rollout, Prompt)


class Engines(Protocol):
    """The interface of rollout.pool.EnginePool, and of scripted engines in tests."""

    def complete(self, requests: Sequence[Sequence[Request]]) -> Iterable[tuple[int, Completion]]: ...


class Scorer(Protocol):
    """The interface of rewards.running.runner.RewardRunner, and of scripted scorers in tests."""

    def is_group(self, task: str) -> bool: ...
    def submit(self, rollout: Rollout) -> Future[Scored]: ...
    def submit_group(self, rollouts: Sequence[Rollout]) -> Sequence[Future[Scored]]: ...
    def submit_row(self, prompt: Prompt, judge: str) -> Future[RowScore]: ...
    def results(self, futures: Sequence[Future[AnyScore]]) -> list[AnyScore]: ...


@dataclass(frozen=True)
class Sample:
    """A response of the policy to a row, and the score of this response."""

    rollout: Rollout
    score: Scored
    tokens: int


@dataclass(frozen=True)
class PolicySampler:
    """Samples responses of the policy for the filters, and lets the scorer score these responses."""

    engines: Engines
    chat: Chat
    scorer: Scorer
    temperature: float
    seed: int
    limit: float  # maximum allowed share of invalid samples

    def samples(
        self, filter_name: str, prompts: Sequence[Prompt], count: int, longest: int, answers: Answers
    ) -> list[list[Sample]]:
        """Returns `count` scored responses for each prompt.

        All responses that are not stored yet are requested from the engines in one call. Each response is scored while
        other responses are still being generated.

        Args:
            longest: the maximum number of tokens of prompt and response together.
        Raises: Stop if too many scores are invalid.
        """
        kind, scores = f"{filter_name} said", RolloutScores(self.scorer, answers, filter_name)
        for prompt in prompts:
            self._score(prompt, range(count), count, kind, answers, scores)
        missing = [[n for n in range(count) if not _is_response(answers.get(kind, p.id, n))] for p in prompts]
        requests = [
            self.requests(filter_name, prompt, numbers, longest) if numbers else []
            for prompt, numbers in zip(prompts, missing, strict=True)
        ]
        places = [(prompt, n) for prompt, numbers in zip(prompts, missing, strict=True) for n in numbers]
        for index, completion in self.engines.complete(requests) if places else ():
            prompt, n = places[index]
            text = self.chat.text(completion.prompt_ids, completion.response_ids)
            record = {"text": text, "finish": completion.finish, "tokens": len(completion.response_ids)}
            record |= {"unusable": completion.unusable} if completion.unusable else {}
            answers.put(kind, prompt.id, n, record)
            self._score(prompt, [n], count, kind, answers, scores)
        found = scores.wait(self.limit)
        return [
            [
                Sample(_rollout(p, record), found[p.id, n], record["tokens"])
                for n in range(count)
                if (record := answers.get(kind, p.id, n)) is not None
            ]
            for p in prompts
        ]

    def requests(self, filter_name: str, prompt: Prompt, numbers: Sequence[int], longest: int) -> list[Request]:
        """Returns one request for each response number in `numbers`. The seed of a request depends only on the run's
        seed, the filter, the row and the number of the response. So the seed is the same after a restart."""
        ids, room = self.chat.prompt_ids(prompt), longest - self.chat.length(prompt)
        seeds = [seed_of(self.seed, filter_name, prompt.id, n) for n in numbers]
        return [Request(ids, prompt.images, room, seed, self.temperature) for seed in seeds]

    def _score(
        self, prompt: Prompt, new: Sequence[int], count: int, kind: str, answers: Answers, scores: "RolloutScores"
    ) -> None:
        """Scores the stored responses whose numbers are in `new`. For a group reward, nothing is scored until all
        responses are stored. Then all responses are scored together."""
        group = self.scorer.is_group(prompt.task)
        records = [(n, answers.get(kind, prompt.id, n)) for n in (range(count) if group else new)]
        stored = [(n, _rollout(prompt, record)) for n, record in records if record is not None]
        if not group:
            for numbered in stored:
                scores.request(prompt.id, [numbered])
        elif len(stored) == count:
            scores.request(prompt.id, stored)


class Scores(Generic[Item, AnyScore]):
    """The scores of one filter. Some scores are stored, and others are still being computed."""

    def __init__(self, scorer: Scorer, answers: Answers, filter_name: str) -> None:
        self.scorer, self.answers, self.filter_name, self.kind = scorer, answers, filter_name, f"{filter_name} score"
        self._found: dict[tuple[str, int], AnyScore] = {}
        self._waiting: dict[tuple[str, int], Future[AnyScore]] = {}

    def submit(self, group: Sequence[tuple[int, Item]]) -> Sequence[Future[AnyScore]]:
        """Starts to score the items in `group`, a list of (number, item) pairs. Returns one future per item."""
        raise NotImplementedError

    def restore(self, item: Item, record: Record) -> AnyScore:
        """Converts a stored record into a score."""
        raise NotImplementedError

    def request(self, row_id: str, group: Sequence[tuple[int, Item]]) -> None:
        """Scores the items in `group`, which all belong to one row. If `answers` already has a valid score for each
        item, nothing is scored again."""
        records = {n: self.answers.get(self.kind, row_id, n) for n, _ in group}
        if all(record is not None and record["invalid"] is None for record in records.values()):
            for n, item in group:
                self._found[row_id, n] = self.restore(item, records[n] or {})
            return
        for (n, _), future in zip(group, self.submit(group), strict=True):
            self._waiting[row_id, n] = future
            future.add_done_callback(lambda done, n=n: self._on_done(row_id, n, done))

    def _on_done(self, row_id: str, number: int, future: Future[AnyScore]) -> None:
        """Stores a score when it arrives. Runs in a worker thread. If the score cannot be stored, this method ignores
        the error. `wait` then tries to store the score once more, and raises an error if this second try fails."""
        if not future.cancelled() and not future.exception():
            with suppress(Stop):
                self._store(row_id, number, future.result())

    def _store(self, row_id: str, number: int, score: AnyScore) -> None:
        details = {name: _json_value(value) for name, value in score.details.items()}
        value = score.value if isinstance(score, RowScore) else score.reward
        self.answers.put(self.kind, row_id, number, {"reward": value, "invalid": score.invalid, "details": details})

    def wait(self, limit: float) -> dict[tuple[str, int], AnyScore]:
        """Returns all scores: (row id, number) -> score. Raises Stop if there are at least ENOUGH_TO_JUDGE scores and
        the share of invalid scores is above `limit`. So many invalid scores mean that the reward itself fails."""
        scored = self.scorer.results(list(self._waiting.values()))
        for (row_id, number), score in zip(self._waiting, scored, strict=True):
            self._store(row_id, number, score)  # the callback `_on_done` may not have stored this score yet
            self._found[row_id, number] = score
        if len(self._found) >= ENOUGH_TO_JUDGE:
            require_valid(list(self._found.values()), limit)
        return self._found


class RolloutScores(Scores[Rollout, Scored]):
    """Scores of the policy's responses."""

    def submit(self, group: Sequence[tuple[int, Rollout]]) -> Sequence[Future[Scored]]:
        rollouts = [rollout for _, rollout in group]
        return self.scorer.submit_group(rollouts) if len(rollouts) > 1 else [self.scorer.submit(rollouts[0])]

    def restore(self, item: Rollout, record: Record) -> Scored:
        return Scored(item, record["reward"], details=record["details"])


class RowScores(Scores[Prompt, RowScore]):
    """Scores that a row judge gives to rows. The number of a score is the number of the pass."""

    def submit(self, group: Sequence[tuple[int, Prompt]]) -> Sequence[Future[RowScore]]:
        return [self.scorer.submit_row(prompt, pass_name(self.filter_name, number)) for number, prompt in group]

    def restore(self, item: Prompt, record: Record) -> RowScore:
        return RowScore(record["reward"], details=record["details"])


def _rollout(prompt: Prompt, record: Record) -> Rollout:
    return Rollout(prompt, record["text"], record["finish"], unusable=record.get("unusable", ""))


def _is_response(record: Record | None) -> bool:
    """False if nothing is stored, or if there was no response because a picture could not be read. The engine is then
    asked again."""
    return record is not None and "unusable" not in record


def _json_value(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
