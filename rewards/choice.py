"""Reward `choice`: 1.0 if the answer picks the right option (A to J), else 0.0."""

import re
from collections.abc import Mapping
from typing import Any

from rewards import Invalid, Rollout, Score, reward
from rewards.text import marked_answer, normalised

LETTERS = "ABCDEFGHIJ"

# All quantifiers are bounded and possessive, so that no text makes these patterns backtrack.
_DECORATION = r"(?:[\s*_(\[{\"'`$]|\\(?:text|textbf|mathbf|mathrm|boxed)\{){0,12}+"
_CLOSING = r"[)\].:,;*_}\"'`$]"
_WORD = r"(?:(?:option|choice|letter)\s{1,4}+)?"
_PHRASE = re.compile(
    r"\b(?:answer|option|choice)\s{1,4}+(?:is|was|must be|should be|would be)\b[ \t*]{0,4}+:?", re.IGNORECASE
)
_FIRST = re.compile(rf"{_DECORATION}{_WORD}{_DECORATION}([A-J])(?![\w'\u2019-])", re.IGNORECASE)
_LABEL_ENDS = re.compile(rf"\s{{0,8}}+(?:{_CLOSING}|$)")
# Finds a second letter directly after the first letter. The first alternative needs a comma or a word such as "or"
# before the second letter: it finds B in "A,B" and "A or B". The second alternative needs a mark such as a bracket, the
# end of the text or a third letter after the second letter: it finds B in "(A) (B)", "A B" and "A B C".
_SECOND = re.compile(
    rf"(?:{_CLOSING}|\s){{0,12}}+"
    rf"(?:(?<=,)|(?:[,;/&+]|or\b|and\b))\s{{0,8}}+{_WORD}[*_(\[{{\"'`$]{{0,8}}+([A-J])(?![\w'\u2019-]|\s{{1,4}}[a-z])"
    rf"|(?:{_CLOSING}|\s){{0,12}}+[*_(\[{{\"'`$]{{0,8}}+([A-J])(?={_CLOSING}|\s{{0,8}}$|\s{{1,4}}[A-J]\b)"
)
_ANYWHERE = re.compile(
    rf"\(([A-Ja-j])\)|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{{1,4}}+([A-J])\b|(?<![\w'\u2019-])(?:([B-HJ])(?![\w'\u2019-])"
    rf"|([AI])(?={_CLOSING}|\s{{0,8}}(?:$|[,;/&+]|or\b|and\b)))"
)


@reward("choice", on_timeout="lowest", verifiable=True)
def choice(rollout: Rollout) -> Score:
    """1.0 for the letter or the text of the right option; 0.0 for a wrong option, several letters or no letter.

    Only one part of the answer counts. This part is the last `\\boxed{...}` if there is one, else the text after the
    last "Answer:", else the text after the last "the answer is", else the whole answer if it is short. The part must
    begin with the letter ("B", "(b)", "**B**", "B. Paris", "option B because ...") or be the text of an option. If no
    part is marked, the letter of the option may be anywhere in the answer ("I think it's B").

    The ground truth is a letter or the text of an option. The options come from the row's `meta["options"]`, which is a
    list in the order of the letters, or a mapping from letter to text. In rows without options only letters are
    compared.
    """
    options = _options(rollout)
    true = _true_letter(rollout, options)
    text = marked_answer(rollout.answer)
    if text is None:
        return Score(0.0, {"why": 'a long answer without \\boxed{...} and without "Answer:"'})
    marked = text != rollout.answer
    if not marked and (phrases := list(_PHRASE.finditer(text))):
        text, marked = text[phrases[-1].end() :], True
    letters = _letters(text, marked, options)
    if len(letters) != 1:
        return Score(0.0, {"why": "several choices" if letters else "no choice in the answer", "answer": text[:200]})
    return Score(float(letters == {true}), {"choice": letters.pop()})


def _letters(text: str, marked: bool, options: Mapping[str, str]) -> set[str]:
    """Returns the letters that the answer picks. `text` is the part of the answer that counts."""
    plain = normalised(text)
    if len(plain) > 1 and (matching := {letter for letter, option in options.items() if option == plain}):
        return {min(matching)}
    first = _FIRST.match(text)
    # "a cat" and "I think" begin with the words "a" and "I", not with the letter of an option
    if first and (_LABEL_ENDS.match(text, first.end()) or first[1] in (LETTERS if marked else "BCDEFGHJ")):
        second = _SECOND.match(text, first.end())
        return {first[1].upper()} | ({(second[1] or second[2]).upper()} if second else set())
    return set() if marked else {"".join(found).upper() for found in _ANYWHERE.findall(text)}


def _options(rollout: Rollout) -> dict[str, str]:
    """Returns the row's options as letter -> normalised text; {} if the row has no options."""
    given, row = rollout.prompt.meta.get("options"), rollout.prompt.id
    if given is None:
        return {}
    if isinstance(given, list | tuple) and len(given) <= len(LETTERS):
        given = dict(zip(LETTERS, given, strict=False))
    if not isinstance(given, Mapping) or not all(_letter(key) for key in given):
        raise Invalid(
            f"the options of row {row} must be a list of at most {len(LETTERS)} texts, or a mapping with keys A to J"
        )
    return {_letter(key): normalised(str(text)) for key, text in given.items()}


def _true_letter(rollout: Rollout, options: Mapping[str, str]) -> str:
    truth, row = rollout.prompt.ground_truth, rollout.prompt.id
    letter = _letter(truth)
    if letter and (letter in options or not options):
        return letter
    matching = [key for key, option in options.items() if option == normalised(str(truth))]
    if len(matching) != 1:
        raise Invalid(
            f"the ground truth of row {row} is {truth!r}; it must be the letter (A to J) or the text of one option"
        )
    return matching[0]


def _letter(value: Any) -> str:
    """Returns the letter in a value such as "B", "(b)" or "B."; "" for any other value."""
    bare = value.strip().strip("().:").upper() if isinstance(value, str) else ""
    return bare if len(bare) == 1 and bare in LETTERS else ""
