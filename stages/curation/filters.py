"""The report's filters, one function or class each: which rows stay, and why the others do not.

A filter gets the rows that are left of a block and says what becomes of each. What it asks of models goes through an
`Answers`, which knows what has been answered before.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rl.config import (
    Accept,
    Checkability,
    Config,
    Difficulty,
    Relevance,
    RewardSpec,
    SynthesisFilterOptions,
    SynthesisOptions,
)
from rl.stop import Stop
from rl.types import Completion, Prompt, Request, Rollout, Scored
from rollout.chat import Chat
from rollout.data.decontamination import Benchmarks
from rollout.pacore.prompt import draw_messages
from rollout.pool import seed_of
from stages.curation.answers import Answers
from stages.loop import enough_valid
from stages.pacore import accepted, pooled, within

ENOUGH_TO_JUDGE = 24  # scores; of fewer a few invalid ones say nothing about the reward
Said = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row on its way: what it is, where it came from, and what filters have found out."""

    prompt: Prompt
    source: int  # number in data.train
    notes: Mapping[str, Any] = field(default_factory=dict)  # by filter; ends in meta.curation

    def noted(self, name: str, note: Any) -> "Row":
        return replace(self, notes={**self.notes, name: note})


@dataclass(frozen=True)
class Fate:
    """What a filter did with a row. `dropped` is None, or why: a few words that many rows share."""

    row: Row
    dropped: str | None = None
    detail: str = ""  # what is special about this row


class Filter(Protocol):
    def __call__(self, rows: Sequence[Row], answers: Answers) -> list[Fate]: ...


class Engines(Protocol):
    """rollout.pool.EnginePool, or scripted ones."""

    def consume(self, requests: Sequence[Sequence[Request]], finished: Callable[[int, Completion], None]) -> None: ...


class Scorer(Protocol):
    """rewards.running.runner.RewardRunner, or a scripted one."""

    def is_group(self, task: str) -> bool: ...
    def submit(self, rollout: Rollout) -> Future[Scored]: ...
    def submit_group(self, rollouts: Sequence[Rollout]) -> Sequence[Future[Scored]]: ...
    def results(self, futures: Sequence[Future[Scored]]) -> list[Scored]: ...


def decontamination(benchmarks: Benchmarks) -> Filter:
    """Rows that benchmarks give away are dropped; nobody is asked."""

    def of(row: Row) -> Fate:
        shared = benchmarks.shared(row.prompt)
        if shared is None:
            return Fate(row)
        return Fate(row, "the same question" if shared.startswith("the question") else "a long passage", shared)

    return lambda rows, answers: [of(row) for row in rows]


# Judges: their questions are rewards under names of their own, one per pass, so that the runner's limits, retries,
# outages and canaries hold for them as for any reward.


def judge_tasks(config: Config) -> dict[str, tuple[RewardSpec, ...]]:
    """Name of a pass -> the reward that asks for it, for the filters that the recipe applies."""
    found: dict[str, tuple[RewardSpec, ...]] = {}
    if "checkability" in config.curate.filters:
        checks = config.curate.checkability
        for vote in range(checks.passes):
            params = {**checks.params, "endpoint": checks.endpoint, "vote": vote}
            found[pass_name("checkability", vote)] = (RewardSpec(use="checkable", params=params),)
    if "relevance" in config.curate.filters:
        rates = config.curate.relevance
        params = {**rates.params, "endpoint": rates.endpoint}
        found[pass_name("relevance", 0)] = (RewardSpec(use="relevant", params=params),)
    return found


def pass_name(name: str, vote: int) -> str:
    """How the rewards call a pass; rows cannot have such a task."""
    return f"curate/{name}/{vote}"


@dataclass(frozen=True)
class Checked:
    """Keeps rows that every pass of the judge calls valid."""

    options: Checkability
    scorer: Scorer
    limit: float  # share of invalid judgements that may be

    def __call__(self, rows: Sequence[Row], answers: Answers) -> list[Fate]:
        votes = _judged("checkability", self.options.passes, rows, self.scorer, answers, self.limit)
        return [self._fate(row, found) for row, found in zip(rows, votes, strict=True)]

    def _fate(self, row: Row, votes: Sequence[Scored]) -> Fate:
        valid = sum(vote.invalid is None and vote.reward == 1 for vote in votes)
        noted = row.noted("checkability", {"valid": valid, "of": len(votes)})
        if valid == len(votes):
            return Fate(noted)
        failed = [vote for vote in votes if vote.invalid is not None]
        if len(failed) + valid == len(votes):  # nobody is against it
            return _unscored(row, failed)
        votes = [vote for vote in votes if vote.invalid is None]
        reason = next((str(why) for vote in votes if vote.reward != 1 and (why := _reason(vote))), "")
        return Fate(noted, "not every pass calls it valid", f"{valid} of {len(votes)}. {reason}".strip())


@dataclass(frozen=True)
class Rated:
    """Keeps rows without pictures, and those whose pictures matter to their question."""

    options: Relevance
    scorer: Scorer
    limit: float

    def __call__(self, rows: Sequence[Row], answers: Answers) -> list[Fate]:
        seeing = [row for row in rows if row.prompt.images]
        grades = iter(_judged("relevance", 1, seeing, self.scorer, answers, self.limit))
        return [self._fate(row, next(grades)[0]) if row.prompt.images else Fate(row) for row in rows]

    def _fate(self, row: Row, grade: Scored) -> Fate:
        if grade.invalid is not None:
            return _unscored(row, [grade])
        noted = row.noted("relevance", round(grade.reward, 4))
        if grade.reward >= self.options.at_least:
            return Fate(noted)
        return Fate(noted, "picture and question do not need each other", f"{grade.reward:g}. {_reason(grade)}".strip())


def _judged(
    name: str, passes: int, rows: Sequence[Row], scorer: Scorer, answers: Answers, limit: float
) -> list[list[Scored]]:
    """Every pass on every row."""
    asked = [
        (row, vote, Rollout(replace(row.prompt, task=pass_name(name, vote)), ""))
        for row in rows
        for vote in range(passes)
    ]
    scores = Scores(scorer, answers, name)
    for row, vote, rollout in asked:
        scores.want(row.prompt.id, [(vote, rollout)])
    found = scores.wait(limit)
    return [[found[row.prompt.id, vote] for vote in range(passes)] for row in rows]


# The policy


@dataclass(frozen=True)
class Policy:
    """Whom the policy's filters ask."""

    engines: Engines
    chat: Chat
    scorer: Scorer
    temperature: float
    seed: int
    limit: float  # share of invalid samples that may be


@dataclass(frozen=True)
class Sample:
    """A response of the policy to a row, and its score."""

    rollout: Rollout
    score: Scored
    tokens: int


@dataclass(frozen=True)
class Tried:
    """Keeps rows that the policy solves sometimes, but not always; what it answered is their pool from then on."""

    options: Difficulty
    accept: Accept
    policy: Policy
    longest: int

    def __call__(self, rows: Sequence[Row], answers: Answers) -> list[Fate]:
        prompts = [row.prompt for row in rows]
        samples = sampled("difficulty", prompts, self.options.rollouts, self.longest, self.policy, answers)
        return [self._fate(row, found) for row, found in zip(rows, samples, strict=True)]

    def _fate(self, row: Row, samples: Sequence[Sample]) -> Fate:
        samples, failed = _valid(samples)
        right = [accepted(sample.score, self.accept) for sample in samples]
        scored = [sample.score for sample in samples]
        prompt = pooled(row.prompt, scored, self.accept, self.policy.chat.reserved)
        return _decided("difficulty", replace(row, prompt=prompt), samples, right, failed)


@dataclass(frozen=True)
class Synthesised:
    """Keeps rows that the policy, shown messages of their pool, solves sometimes, but not always."""

    options: SynthesisFilterOptions
    messages: SynthesisOptions
    accept: Accept
    policy: Policy

    def __call__(self, rows: Sequence[Row], answers: Answers) -> list[Fate]:
        fates = [self._before(row) for row in rows]
        shown: dict[int, Prompt] = {}
        for number, fate in enumerate(fates):
            if fate.dropped is not None:
                continue
            try:
                shown[number] = self.shown(fate.row.prompt)
                tokens = self.policy.chat.length(shown[number])
            except ValueError as error:  # what a message does to template or chat
                fates[number] = Fate(fate.row, "cannot be shown with its messages", str(error))
                continue
            if tokens >= self.options.max_sequence_length:
                fates[number] = Fate(fate.row, "too long with its messages", f"{tokens} tokens")
        left = [number for number in shown if fates[number].dropped is None]
        samples = sampled(
            "synthesis",
            [shown[number] for number in left],
            self.options.rollouts,
            self.options.max_sequence_length,
            self.policy,
            answers,
        )
        for number, found in zip(left, samples, strict=True):
            fates[number] = self._after(fates[number].row, found)
        return fates

    def shown(self, prompt: Prompt) -> Prompt:
        """The row's problem with messages of its pool: the same ones whenever it is asked."""
        seed = f"{self.policy.seed}/synthesis/{prompt.id}"
        return draw_messages(prompt, self.messages.least_messages, self.messages.most_messages, seed)

    def _before(self, row: Row) -> Fate:
        options, pool, share = self.messages, row.prompt.messages_pool, row.prompt.pool_accuracy
        if len(pool) < options.least_messages:
            return Fate(row, "too few messages", f"{len(pool)} of the {options.least_messages} needed")
        if within(options, share):
            return Fate(row)
        wrong = options.accuracy_over is not None and (share is None or share <= options.accuracy_over)
        return Fate(row, f"messages too often {'wrong' if wrong else 'right'}", f"accuracy {share}")

    def _after(self, row: Row, samples: Sequence[Sample]) -> Fate:
        samples, failed = _valid(samples)
        right = [accepted(sample.score, self.accept) for sample in samples]
        return _decided("synthesis", row, samples, right, failed)


def some_accept(right: Sequence[bool]) -> str | None:
    """Why a row is dropped: all or none of its responses are accepted. None if it stays (report, 3.2.3)."""
    if not any(right):
        return "never accepted"
    return "always accepted" if all(right) else None


def sampled(
    name: str,
    prompts: Sequence[Prompt],
    count: int,
    longest: int,
    policy: Policy,
    answers: Answers,
) -> list[list[Sample]]:
    """`count` scored responses to each prompt. All that are missing go to the engines at once; each is remembered when
    it is there, and scored while others are generated.

    Args:
        longest: tokens of prompt and response together, at most.
    """
    saying, scoring = f"{name} said", Scores(policy.scorer, answers, name)
    said = _Complete(prompts, count, saying, answers, scoring)
    missing = [[n for n in range(count) if answers.get(saying, p.id, n) is None] for p in prompts]
    requests = [
        asked(name, prompt, numbers, longest, policy) if numbers else []
        for prompt, numbers in zip(prompts, missing, strict=True)
    ]
    places = [(row, n) for row, numbers in enumerate(missing) for n in numbers]

    def finished(place: int, completion: Completion) -> None:
        row, n = places[place]
        text = policy.chat.text(completion.prompt_ids, completion.response_ids)
        said.put(row, n, {"text": text, "finish": completion.finish, "tokens": len(completion.response_ids)})

    if places:
        policy.engines.consume(requests, finished)
    found = scoring.wait(policy.limit)
    return [
        [
            Sample(_rollout(p, record), found[p.id, n], record["tokens"])
            for n in range(count)
            if (record := answers.get(saying, p.id, n)) is not None
        ]
        for p in prompts
    ]


class _Complete:
    """Has responses scored: each at once, or those of a prompt together where its reward wants that."""

    def __init__(self, prompts: Sequence[Prompt], count: int, kind: str, answers: Answers, scores: "Scores") -> None:
        self.prompts, self.count, self.kind, self.answers, self.scores = prompts, count, kind, answers, scores
        for prompt in prompts:
            self._score(prompt, range(count))

    def put(self, row: int, n: int, record: Said) -> None:
        self.answers.put(self.kind, self.prompts[row].id, n, record)
        self._score(self.prompts[row], [n])

    def _score(self, prompt: Prompt, new: Sequence[int]) -> None:
        """Those of `new` that are there, or the whole group once it is."""
        group = self.scores.scorer.is_group(prompt.task)
        said = [(n, self.answers.get(self.kind, prompt.id, n)) for n in (range(self.count) if group else new)]
        there = [(n, _rollout(prompt, record)) for n, record in said if record is not None]
        if not group:
            for one in there:
                self.scores.want(prompt.id, [one])
        elif len(there) == self.count:
            self.scores.want(prompt.id, there)


class Scores:
    """Scores that are known, or under way; each is remembered when it is there."""

    def __init__(self, scorer: Scorer, answers: Answers, name: str) -> None:
        self.scorer, self.answers, self.kind = scorer, answers, f"{name} score"
        self._found: dict[tuple[str, int], Scored] = {}
        self._waiting: dict[tuple[str, int], Future[Scored]] = {}

    def want(self, identity: str, group: Sequence[tuple[int, Rollout]]) -> None:
        """Score the rollouts of one row that belong together (numbered), unless all are known. Those that went wrong
        are not."""
        known = {n: self.answers.get(self.kind, identity, n) for n, _ in group}
        if all(record is not None and record["invalid"] is None for record in known.values()):
            for n, rollout in group:
                record = known[n] or {}
                self._found[identity, n] = Scored(rollout, record["reward"], details=record["details"])
            return
        rollouts = [rollout for _, rollout in group]
        futures = self.scorer.submit_group(rollouts) if len(group) > 1 else [self.scorer.submit(rollouts[0])]
        for (n, _), future in zip(group, futures, strict=True):
            self._waiting[identity, n] = future
            future.add_done_callback(lambda done, n=n: self._done(identity, n, done))

    def _done(self, identity: str, number: int, future: Future[Scored]) -> None:
        """In some thread, where nobody hears of an error; `wait` does all this again."""
        if not future.cancelled() and not future.exception():
            with suppress(Stop):
                self._remember(identity, number, future.result())

    def _remember(self, identity: str, number: int, score: Scored) -> None:
        details = {name: _plain(value) for name, value in score.details.items()}
        record = {"reward": score.reward, "invalid": score.invalid, "details": details}
        self.answers.put(self.kind, identity, number, record)

    def wait(self, limit: float) -> dict[tuple[str, int], Scored]:
        """All of them by row and number. Raises Stop if more than the share `limit` is invalid: then the reward fails,
        and not this row or that."""
        scored = self.scorer.results(list(self._waiting.values()))
        for (identity, number), score in zip(self._waiting, scored, strict=True):
            self._remember(identity, number, score)  # the callback may not have run yet
            self._found[identity, number] = score
        if len(self._found) >= ENOUGH_TO_JUDGE:
            enough_valid(list(self._found.values()), limit)
        return self._found


def asked(name: str, prompt: Prompt, numbers: Sequence[int], longest: int, policy: Policy) -> list[Request]:
    """One prompt's requests. Seeds come from the row, so that neither blocks nor a restart change what is sampled."""
    ids, room = policy.chat.prompt_ids(prompt), longest - policy.chat.length(prompt)
    seeds = [seed_of(policy.seed, name, prompt.id, n) for n in numbers]
    return [Request(ids, prompt.images, room, seed, policy.temperature) for seed in seeds]


def _rollout(prompt: Prompt, record: Said) -> Rollout:
    return Rollout(prompt, record["text"], record["finish"])


def _valid(samples: Sequence[Sample]) -> tuple[list[Sample], list[Scored]]:
    """Those that have a score, and what became of the others."""
    scores = [sample.score for sample in samples]
    return [s for s in samples if s.score.invalid is None], [s for s in scores if s.invalid is not None]


def _decided(name: str, row: Row, samples: Sequence[Sample], right: Sequence[bool], failed: Sequence[Scored]) -> Fate:
    """Some-accept, unless scores are missing that could change it."""
    noted = row.noted(name, _note(samples, right)) if samples else row
    why = some_accept(right)
    if why is not None and failed:
        return _unscored(noted, failed)
    return Fate(noted, why, f"{sum(right)} of {len(right)}")


def _unscored(row: Row, failed: Sequence[Scored]) -> Fate:
    """A row that cannot be decided because of scores that went wrong."""
    return Fate(row, "could not be scored", str(failed[0].invalid))


def _note(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, Any]:
    tokens = sum(sample.tokens for sample in samples) / len(samples)
    return {"accepted": sum(right), "of": len(right), "tokens_mean": round(tokens, 2)}


def _reason(score: Scored) -> str:
    return str(score.details.get("reason") or "")


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
