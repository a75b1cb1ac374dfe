"""Behaviour penalty `language_consistency`: the answer is in another language than the question, or in two languages.

The STEP3-VL report discourages "code-switching and question-answer language mismatch" with a model-based penalty. The
report names no model and no threshold. The method (rewards.prose, rewards.languages) and all numbers are
reconstructions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rewards import Rollout, Score, penalty
from rewards.languages import LANGUAGES, TELLING, Identifier, Languages, same_script
from rewards.prose import MAX_CHARS, WORD, plain, without_code_and_quotations
from rewards.text import words_of

SCRIPT_TELLING = 5  # minimum weight of prose to identify its script: two Han characters or a short Latin word


@penalty("language_consistency", on_timeout="lowest")
class LanguageConsistency:
    """1.0 if the answer is not in the question's language or mixes two languages, else 0.0.

    An answer offends if (a) it is in another language than the question, or (b) more than `tolerance` of its prose is
    in a second language. The details contain the languages, the share of each language, and the reason.

    The question is the text of the last user message. The languages of the question are allowed. If a user or system
    message contains the name of a language ("into French", "用英文回答"), this language is always allowed too. The
    scripts of the question's first and last word are also allowed, because a question may be a long text in one
    language, with a short instruction in another language before or after the text. If the question is too short to
    identify its language, every language of its script is allowed ("Solve it" allows all languages in Latin script). If
    the question has no prose, every language is allowed.

    These parts of the answer are ignored: program code, formulas, quotations up to 300 characters, blockquotes, URLs,
    words with digits, a single foreign word, and foreign words that the question also contains. If the answer is mainly
    in another script than Latin, Latin names and terms of up to three words are ignored too. If a code fence
    or delimiter is never closed, the text after it counts as prose. An answer that has only code or quotations is not
    judged, and the details say so. To distinguish languages of the same script, the text is split into pieces of forty
    letters. So a switch from English to Spanish for one word is not noticed. An answer that only repeats a text from a
    picture, without quotation marks and in another language than the question, counts as an answer in that language,
    because the reward does not see the picture.

    languages  ISO 639-1 codes of two or more languages to distinguish. Text in any other language is treated as text
               in the most similar of these languages
    tolerance  the share of the prose that may be in a second language (reconstruction)
    reasoning  True: the text before `</think>` is judged too. (The report speaks only of questions and answers.)
    accurate   True: uses lingua's large models (690 MB, 11 s to load) instead of its small models (40 MB, 0.6 s)

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
            raise ValueError(f"language_consistency: languages is {languages}; at least two languages are needed")
        if not 0 <= tolerance < 1:
            raise ValueError(f"language_consistency: tolerance is {tolerance}; it must be at least 0 and below 1")
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
        """Returns a reason, which is stored in the details. If the text offends, the reason starts with "another" or
        "mixed"."""
        main = found.main
        if main is None or found.total < TELLING:
            hidden = "; nearly all of the text is code, formulas or quotations" if found.dropped > 10 * TELLING else ""
            other = main and allowed and found.total >= 2 * SCRIPT_TELLING and not same_script(main, allowed)
            return f"another script: {main}" if other else f"too little prose to identify its language{hidden}"
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
        """Returns the labels of the languages and scripts that the answer may use; empty if it may use any language."""
        found = self.identifier.analysed(question)
        if found.total < SCRIPT_TELLING:
            return set()
        labels = {label for label, weight in found.weights.items() if weight >= max(SCRIPT_TELLING, found.total / 10)}
        # A question may have a short instruction in one script before or after a long text in another script.
        words = list(WORD.finditer(without_code_and_quotations(plain(question))))
        for word in (*words[:1], *words[-1:]):
            script = f"{word.lastgroup} script"
            if not (same_script(script, labels) or (word.lastgroup == "Han" and "ja" in labels)):
                labels.add(script)
        instructions = "\n".join(words_of(m)[:MAX_CHARS] for m in messages if m["role"] != "assistant")
        return labels | self.identifier.named_in(instructions)


def _agrees(label: str, allowed: set[str]) -> bool:
    """True if a label is allowed. A label that names only a script agrees with every language of this script."""
    if label in allowed:
        return True
    scripts = {one for one in allowed if one.endswith(" script")}
    return same_script(label, allowed if label.endswith(" script") else scripts)
