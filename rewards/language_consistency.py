"""Behaviour penalty `language_consistency`: an answer in another language than the question, or in two at once.

The report discourages "code-switching and question-answer language mismatch" with a model-based penalty and gives
neither the model nor a threshold. Everything measured here (rewards.prose, rewards.languages, the numbers) is a
reconstruction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rewards import Rollout, Score, penalty
from rewards.languages import LANGUAGES, TELLING, Identifier, Languages, same_script
from rewards.prose import MAX_CHARS, WORD, plain, without_code_and_quotations
from rewards.text import words_of

SCRIPT_TELLING = 5  # weight of prose that tells a script: two Han characters or a short Latin word


@penalty("language_consistency", on_timeout="lowest")
class LanguageConsistency:
    """1.0 if the answer is not in the question's language, or not in one language, else 0.0.

    That is: if it (a) is in another language than the question, or (b) has more than `tolerance` of its prose in a
    second language. Details: the languages, their shares and why.

    The question is the text of the last user message. Allowed are its language or languages; every language that a
    user or system message names ("into French", "用英文回答"), whatever the reason it is named for; and the script of
    the question's first and last word, where instructions about text in another language stand. A question too short
    to tell only fixes the script ("Solve it" does not ask for Chinese), one without any prose fixes nothing.

    What does not count: code, formulas, quotations up to 300 characters, blockquotes, URLs, words with digits, Latin
    names and terms of up to three words in text of another script (until they are over half of the prose), a single
    foreign word, and foreign words taken from the question. Fences and delimiters that never close hide nothing. An
    answer of nothing but code or quotations is therefore not judged; its details say so. Two languages of one script
    are told apart by pieces of forty letters, so a switch of one word between, say, English and Spanish goes
    unnoticed.

    languages  ISO 639-1 codes to tell apart, two or more; text in others is taken for the nearest of them
    tolerance  share of the prose in a second language that is let pass (reconstruction)
    reasoning  whether what stands before `</think>` is judged too (the report speaks of questions and answers)
    accurate   lingua's large models, which take 11 s to load and 690 MB instead of 0.6 s and 40 MB

    Raises ValueError for unknown languages.
    """

    def __init__(
        self,
        languages: list[str] | None = None,
        tolerance: float = 0.1,
        reasoning: bool = False,
        accurate: bool = False,
    ):
        self.identifier = Identifier(languages or LANGUAGES, accurate)
        if len(self.identifier.languages) < 2:
            raise ValueError(f"language_consistency: languages is {languages}; it takes two or more to tell apart")
        if not 0 <= tolerance < 1:
            raise ValueError(f"language_consistency: tolerance is {tolerance}; it is a share from 0 to below 1")
        self.tolerance, self.reasoning = tolerance, reasoning

    def setup(self) -> None:
        try:
            self.identifier.load()
        except ValueError as e:
            raise ValueError(f"language_consistency: {e}") from e

    def __call__(self, rollout: Rollout) -> Score:
        question = next((words_of(m) for m in reversed(rollout.prompt.messages) if m["role"] == "user"), "")
        allowed = self.allowed(question, rollout.prompt.messages)
        parts = {"answer": rollout.answer, "reasoning": rollout.reasoning if self.reasoning else ""}
        details: dict[str, Any] = {"allowed": sorted(allowed)}
        offence = 0.0
        for part, text in parts.items():
            if text:
                found = self.identifier.analysed(text, known=question)
                why = self.judged(found, allowed)
                offence = max(offence, float(why.startswith(("another", "mixed"))))
                details[part] = {"languages": found.shares(), "why": why}
        return Score(offence, details)

    def judged(self, found: Languages, allowed: set[str]) -> str:
        """What is to be said of a text's languages; offences start with "another" or "mixed"."""
        main = found.main
        if main is None or found.total < TELLING:
            hidden = ", and nearly all of it is code, formulas or quotations" if found.dropped > 10 * TELLING else ""
            other = main and allowed and found.total >= 2 * SCRIPT_TELLING and not same_script(main, allowed)
            return f"another script: {main}" if other else f"too little prose to tell{hidden}"
        if allowed and not _agrees(main, allowed):
            return f"another language: {main}"
        foreign = {
            label: weight / found.total
            for label, weight in found.weights.items()
            if not _agrees(label, allowed | {main})
        }
        if sum(foreign.values()) > self.tolerance:
            return f"mixed: {', '.join(foreign)} in {main}"
        return "consistent"

    def allowed(self, question: str, messages: Sequence[Mapping[str, Any]]) -> set[str]:
        """Labels an answer may be in; empty if the question does not tell."""
        found = self.identifier.analysed(question)
        if found.total < SCRIPT_TELLING:
            return set()
        labels = {label for label, weight in found.weights.items() if weight >= max(SCRIPT_TELLING, found.total / 10)}
        # An instruction about text of another script stands at one end of it, however short it is.
        words = list(WORD.finditer(without_code_and_quotations(plain(question))))
        for word in (*words[:1], *words[-1:]):
            script = f"{word.lastgroup} script"
            if not (same_script(script, labels) or (word.lastgroup == "Han" and "ja" in labels)):
                labels.add(script)
        asked = "\n".join(words_of(m)[:MAX_CHARS] for m in messages if m["role"] != "assistant")
        return labels | self.identifier.named_in(asked)


def _agrees(label: str, allowed: set[str]) -> bool:
    """Whether a label is allowed; one that only names a script agrees with every language of that script."""
    if label in allowed:
        return True
    scripts = {one for one in allowed if one.endswith(" script")}
    return same_script(label, allowed if label.endswith(" script") else scripts)
