"""The curation filters of the STEP3-VL-10B report. A filter decides whether a row is kept or dropped, and gives the
reason for a drop.

The filters run one after the other. Each filter gets the rows that no earlier filter has dropped, and returns one
decision per row. The models' answers are stored in `Answers`, so that no question is asked twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rl.config import (
    Accept,
    Checkability,
    Difficulty,
    Relevance,
    SynthesisFilterOptions,
    SynthesisOptions,
)
from rl.types import Prompt, RowScore, Scored
from rollout.data.decontamination import Benchmarks
from rollout.pacore.prompt import draw_messages
from stages.curation.answers import Answers
from stages.curation.sampling import PolicySampler, RowScores, Sample, Scorer
from stages.pacore import is_accepted, with_pool, within_bounds


@dataclass(frozen=True)
class CandidateRow:
    """A data row, with the results of the filters that it has passed."""

    prompt: Prompt
    source: int  # index of the row's source in data.train
    notes: Mapping[str, Any] = field(default_factory=dict)  # filter name -> result; written to meta.curation

    def with_note(self, filter_name: str, note: Any) -> "CandidateRow":
        """Returns the row with the result of one more filter."""
        return replace(self, notes={**self.notes, filter_name: note})


@dataclass(frozen=True)
class Decision:
    """The decision of a filter about one row."""

    row: CandidateRow
    # None if the row is kept, else the reason for the drop. The reason contains no details of the row, so that equal
    # reasons can be counted.
    dropped: str | None = None
    detail: str = ""  # details of the reason for this row
    filter: str = ""  # name of the filter that dropped the row; "" if it is kept


class Filter(Protocol):
    def __call__(self, rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]: ...


@dataclass(frozen=True)
class DecontaminationFilter:
    """Drops rows that overlap with a benchmark. This filter calls no model."""

    benchmarks: Benchmarks

    def __call__(self, rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]:
        return [self._decide(row) for row in rows]

    def _decide(self, row: CandidateRow) -> Decision:
        shared = self.benchmarks.shared(row.prompt)
        if shared is None:
            return Decision(row)
        return Decision(row, "the same question" if shared.startswith("the question") else "a long passage", shared)


# Judges


@dataclass(frozen=True)
class CheckabilityFilter:
    """Asks a judge several times (passes) about each row. Keeps the rows that the judge calls valid in every pass."""

    options: Checkability
    scorer: Scorer
    limit: float  # maximum allowed share of invalid judgements

    def __call__(self, rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]:
        votes = _judge("checkability", self.options.passes, rows, self.scorer, answers, self.limit)
        return [self._decide(row, row_votes) for row, row_votes in zip(rows, votes, strict=True)]

    def _decide(self, row: CandidateRow, votes: Sequence[RowScore]) -> Decision:
        positive = sum(vote.invalid is None and vote.value == 1 for vote in votes)
        noted = row.with_note("checkability", {"valid": positive, "of": len(votes)})
        if positive == len(votes):
            return Decision(noted)
        failed = [vote for vote in votes if vote.invalid is not None]
        if len(failed) + positive == len(votes):  # some votes failed, and all others say "valid"
            return _not_scored(row, failed)
        negative = (vote for vote in votes if vote.invalid is None and vote.value != 1)
        reason = next((text for vote in negative if (text := _reason(vote))), "")
        return Decision(noted, "not every pass calls it valid", f"{positive} of {len(votes)}. {reason}".strip())


@dataclass(frozen=True)
class RelevanceFilter:
    """Keeps rows without pictures, and rows whose pictures the judge finds relevant to the question."""

    options: Relevance
    scorer: Scorer
    limit: float  # maximum allowed share of invalid judgements

    def __call__(self, rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]:
        with_pictures = [row for row in rows if row.prompt.images]
        grades = iter(_judge("relevance", 1, with_pictures, self.scorer, answers, self.limit))
        return [self._decide(row, next(grades)[0]) if row.prompt.images else Decision(row) for row in rows]

    def _decide(self, row: CandidateRow, grade: RowScore) -> Decision:
        if grade.invalid is not None:
            return _not_scored(row, [grade])
        noted = row.with_note("relevance", round(grade.value, 4))
        if grade.value >= self.options.at_least:
            return Decision(noted)
        detail = f"{grade.value:g}. {_reason(grade)}".strip()
        return Decision(noted, "the pictures are not relevant to the question", detail)


def _judge(
    filter_name: str, passes: int, rows: Sequence[CandidateRow], scorer: Scorer, answers: Answers, limit: float
) -> list[list[RowScore]]:
    """Returns one list of scores per row, with one score per pass."""
    scores = RowScores(scorer, answers, filter_name)
    for row in rows:
        for number in range(passes):
            scores.request(row.prompt.id, [(number, row.prompt)])
    found = scores.wait(limit)
    return [[found[row.prompt.id, number] for number in range(passes)] for row in rows]


# The policy


@dataclass(frozen=True)
class DifficultyFilter:
    """Keeps rows that the policy solves sometimes but not always. The policy's final answers to a row become the pool
    of this row."""

    options: Difficulty
    accept: Accept
    policy: PolicySampler
    longest: int  # maximum tokens of prompt and response together

    def __call__(self, rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]:
        prompts = [row.prompt for row in rows]
        samples = self.policy.samples("difficulty", prompts, self.options.rollouts, self.longest, answers)
        return [self._decide(row, row_samples) for row, row_samples in zip(rows, samples, strict=True)]

    def _decide(self, row: CandidateRow, samples: Sequence[Sample]) -> Decision:
        valid = [sample.score for sample in samples if sample.score.invalid is None]
        prompt = with_pool(row.prompt, valid, self.accept, self.policy.chat.reserved)
        return _decide_by_accuracy("difficulty", replace(row, prompt=prompt), samples, self.accept)


@dataclass(frozen=True)
class SynthesisFilter:
    """Puts pooled answers into the prompt of each row. Keeps rows that the policy then solves sometimes but not
    always."""

    options: SynthesisFilterOptions
    messages: SynthesisOptions
    accept: Accept
    policy: PolicySampler

    def __call__(self, rows: Sequence[CandidateRow], answers: Answers) -> list[Decision]:
        decisions = [self._check_pool(row) for row in rows]
        prompts: dict[int, Prompt] = {}
        for index, decision in enumerate(decisions):
            if decision.dropped is not None:
                continue
            try:
                prompt = self.with_messages(decision.row.prompt)
                tokens = self.policy.chat.length(prompt)
            except ValueError as error:  # the synthesis template or the chat template refuses a message
                decisions[index] = Decision(decision.row, "a template fails on its messages", str(error))
                continue
            if tokens < self.options.max_sequence_length:
                prompts[index] = prompt
            else:
                decisions[index] = Decision(decision.row, "too long with its messages", f"{tokens} tokens")
        samples = self.policy.samples(
            "synthesis", list(prompts.values()), self.options.rollouts, self.options.max_sequence_length, answers
        )
        for index, row_samples in zip(prompts, samples, strict=True):
            decisions[index] = _decide_by_accuracy("synthesis", decisions[index].row, row_samples, self.accept)
        return decisions

    def with_messages(self, prompt: Prompt) -> Prompt:
        """Adds pooled answers to the prompt. Always draws the same answers, because the seed comes from the row's
        id."""
        seed = f"{self.policy.seed}/synthesis/{prompt.id}"
        return draw_messages(prompt, self.messages.least_messages, self.messages.most_messages, seed)

    def _check_pool(self, row: CandidateRow) -> Decision:
        options, pool, accuracy = self.messages, row.prompt.messages_pool, row.prompt.pool_accuracy
        if len(pool) < options.least_messages:
            return Decision(row, "too few messages", f"{len(pool)} of the {options.least_messages} needed")
        if within_bounds(options, accuracy):
            return Decision(row)
        wrong = options.accuracy_over is not None and (accuracy is None or accuracy <= options.accuracy_over)
        return Decision(row, f"messages too often {'wrong' if wrong else 'right'}", f"accuracy {accuracy}")


def drop_reason(accepted: Sequence[bool]) -> str | None:
    """Returns None if a row is kept, else the reason why it is dropped. A row is kept if some of its responses are
    accepted and others are rejected (STEP3-VL-10B report, 3.2.3)."""
    if not any(accepted):
        return "never accepted"
    return "always accepted" if all(accepted) else None


def _decide_by_accuracy(filter_name: str, row: CandidateRow, samples: Sequence[Sample], accept: Accept) -> Decision:
    """Applies `drop_reason` to the valid scores. A dropped row that also has invalid scores gets the reason "could not
    be scored". If all its scores were valid, this row might be kept."""
    valid = [sample for sample in samples if sample.score.invalid is None]
    failed = [sample.score for sample in samples if sample.score.invalid is not None]
    accepted = [is_accepted(sample.score, accept) for sample in valid]
    noted = row.with_note(filter_name, _note(valid, accepted)) if valid else row
    reason = drop_reason(accepted)
    if reason is not None and failed:
        return _not_scored(noted, failed)
    return Decision(noted, reason, f"{sum(accepted)} of {len(accepted)}")


def _not_scored(row: CandidateRow, failed: Sequence[Scored | RowScore]) -> Decision:
    """Drops a row that has invalid scores. The row might have been kept if all scores were valid."""
    return Decision(row, "could not be scored", str(failed[0].invalid))


def _note(samples: Sequence[Sample], accepted: Sequence[bool]) -> dict[str, Any]:
    tokens = sum(sample.tokens for sample in samples) / len(samples)
    return {"accepted": sum(accepted), "of": len(accepted), "tokens_mean": round(tokens, 2)}


def _reason(score: RowScore) -> str:
    return str(score.details.get("reason") or "")
