"""Reward `choice`: 1.0 if the answer picks the right option (A to Z), else 0.0."""

# the patterns contain punctuation and words of several scripts

import re
from collections.abc import Mapping, Set
from string import ascii_uppercase
from typing import Any

from rewards import Invalid, Rollout, Score, reward
from rewards.answer import bold, find, last_line
from rewards.text import normalised, wide_folded

USUAL = "ABCDEFGHIJ"
"""The letters that a row without options may have, unless its ground truth is a later letter."""

# All quantifiers are bounded and possessive, so that no text makes these patterns backtrack.
_DECORATION = r"(?:[\s*_(\[{\"'`$【]|\\(?:text|textbf|mathbf|mathrm|boxed)\{|\\[(\[])*+"
_CLOSING = r"[)\].:,;*_}\"'`$、。】]"
_WORD = r"(?:(?:(?:the\s)?(?:option|choice|letter)\s{1,4}|选项|選項|选择|選擇)\s{0,4})?+"
_NOT_IN_WORD = r"(?![A-Za-z0-9_'\u2019-])"
_FIRST = re.compile(rf"{_DECORATION}{_WORD}{_DECORATION}([A-Z]){_NOT_IN_WORD}", re.IGNORECASE)
_LABEL_ENDS = re.compile(rf"\s{{0,8}}+(?:{_CLOSING}|\\[)\]]|$|[\u3040-\u9fff\uac00-\ud7af])")
_JOINED = (
    r"(?:or|and|oder|und|ou|et|y|e|o)\b\s{0,4}(?:(?:maybe|perhaps|possibly|probably|also|even)\b)?|[,;/&+、或和与及跟]"
)
# Finds a further letter directly after a letter. The first alternative needs a comma or a word such as "or" before the
# letter: it finds B in "A,B" and "A or B". The second alternative needs a mark such as a bracket, the end of the text
# or one more letter after the letter: it finds B in "(A) (B)", "A B" and "A B C".
_FURTHER = re.compile(
    rf"(?:(?![,、]){_CLOSING}|\s){{0,12}}+(?:{_JOINED})\s{{0,8}}+(?:{_JOINED})?\s{{0,8}}+{_WORD}[*_(\[{{\"'`$]{{0,8}}+([A-Z])"
    rf"{_NOT_IN_WORD}(?!\s{{1,4}}(?!or\b|and\b|oder\b|und\b|ou\b|et\b)[a-z])"
    rf"|(?:{_CLOSING}|\s){{0,12}}+[*_(\[{{\"'`$]{{0,8}}+([A-Z])(?={_CLOSING}|\s{{0,8}}$|\s{{1,4}}[A-Z]\b)"
)
_ANYWHERE = re.compile(
    rf"\(([A-Za-z])\)|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{{1,4}}+([A-Z])\b|(?:选项|選項|选择|選擇)\s?([A-Z])(?![A-Za-z])"
    rf"|(?<![A-Za-z0-9_'\u2019-])(?:([B-HJ-Z]){_NOT_IN_WORD}|([AI])(?={_CLOSING}|\s{{0,8}}(?:$|[,;/&+]|or\b|and\b)))"
)
_ALONE = re.compile(rf"{_DECORATION}{_WORD}{_DECORATION}([A-Z])(?:{_CLOSING}|\\[)\]]|\s){{0,12}}+")
_SEVERAL = re.compile(r"[A-Z](?:(?:\s{0,4}[,;、&/+]\s{0,4}|\s{1,4}and\s{1,4}|\s{0,4})[A-Z]){1,25}")
_LABELLED = re.compile(r"\(?([A-Z])\s{0,4}[).:、]\s{0,4}(.+)", re.DOTALL)


@reward(
    "choice",
    on_timeout="lowest",
    verifiable=lambda truth: " and ".join(truth) if isinstance(truth, list) else str(truth),
)
def choice(rollout: Rollout) -> Score:
    """1.0 for the letter or the text of the right option; 0.0 for a wrong option, several letters or no letter.

    The marked part of the answer counts (see rewards/answer.py). It must begin with the letter ("B", "(b)", "**B**",
    "B. Paris", "option B because ...", "B、巴黎") or be the text of an option. If nothing is marked, these are tried in
    turn: the whole answer is the text of an option; a line is an option alone (the last such line counts); the answer
    begins with "B." or similar; a text in bold or the last line is an option; the answer contains a letter somewhere
    ("I think it's B"). An answer that picks several letters is wrong.

    The ground truth is a letter, the text of an option, or both ("B. Paris"). It may have a mark, such as
    "<answer> B </answer>". If several options are right together, it is a list of letters or a text such as "BD". Then
    the answer must pick exactly these letters. The options come from the row's `meta["options"]`, which is a list in
    the order of the letters, or a mapping from letter to text. In rows without options only letters are compared.
    """
    options = _options(rollout)
    true = _true_letters(rollout, options)
    known = (
        frozenset(options)
        if options
        else frozenset(ascii_uppercase[: max(len(USUAL), *(ord(one) - 64 for one in true))])
    )
    found = find(wide_folded(rollout.answer))
    if found is None:
        return Score(0.0, {"why": "a long answer without a mark such as \\boxed{...} or Answer:"})
    pick = _marked if found.mark else _unmarked
    letters = _all_of(found.text, known) if len(true) > 1 else set()
    letters = letters or pick(found.text, options) & known
    if len(letters) != len(true):
        return Score(
            0.0, {"why": "several choices" if letters else "no choice in the answer", "answer": found.text[:200]}
        )
    return Score(float(letters == true), {"choice": "".join(sorted(letters))})


def _marked(text: str, options: Mapping[str, str]) -> set[str]:
    """Returns the letters that the marked part of an answer picks."""
    if letter := _option_text(text, options):
        return {letter}
    first = _FIRST.match(text)
    return _from(text, first) if first else set()


def _unmarked(text: str, options: Mapping[str, str]) -> set[str]:
    """Returns the letters that an answer without a mark picks."""
    if letter := _option_text(text, options):
        return {letter}
    if alone := _lines_alone(text):
        return alone
    first = _FIRST.match(text)
    # "a cat" and "I think" begin with the words "a" and "I", not with the letter of an option
    if first and (
        _LABEL_ENDS.match(text, first.end()) or first[1] in ascii_uppercase.replace("A", "").replace("I", "")
    ):
        return _from(text, first)
    for part in filter(None, (bold(text), last_line(text))):
        if option := _option_text(part, options):
            return {option}
        if part != text and (letter := _ALONE.fullmatch(part)):
            return {letter[1].upper()}
    return {"".join(found).upper() for found in _ANYWHERE.findall(text)}


def _from(text: str, first: re.Match[str]) -> set[str]:
    """Returns the letter that `first` matches, and the letters directly after it."""
    letters, end = {first[1].upper()}, first.end()
    while further := _FURTHER.match(text, end):
        letters.add(further[1] or further[2])
        end = further.end()
    return letters


def _lines_alone(text: str) -> set[str]:
    """Returns the letter of the last line that is a letter alone. If the lines directly before it are such lines too,
    returns all their letters."""
    letters: set[str] = set()
    for line in reversed([line for line in text.split("\n") if line.strip()]):
        if alone := _ALONE.fullmatch(line.strip()):
            letters.add(alone[1])
        elif letters:
            break
    return letters


def _all_of(text: str, known: Set[str]) -> set[str]:
    """Returns the letters of a text such as "BD", "B, D" or "B and D"; an empty set for other texts."""
    plain = text.strip(" .。()[]")
    return set(re.findall(r"[A-Z]", plain.replace("and", ""))) & known if _SEVERAL.fullmatch(plain) else set()


def _option_text(text: str, options: Mapping[str, str]) -> str:
    """Returns the first letter whose option has this text, or "". A single letter is read as the letter of an option,
    not as its text."""
    plain = normalised(text)
    if plain.upper() in options:
        return ""
    return min((letter for letter, option in options.items() if option == plain), default="")


def _options(rollout: Rollout) -> dict[str, str]:
    """Returns the row's options as letter -> normalised text; {} if the row has no options."""
    given, row = rollout.prompt.meta.get("options"), rollout.prompt.id
    if given is None:
        return {}
    if isinstance(given, list | tuple) and len(given) <= len(ascii_uppercase):
        given = dict(zip(ascii_uppercase, given, strict=False))
    if not isinstance(given, Mapping) or not all(_letter(key) for key in given):
        raise Invalid(
            f"the options of row {row} must be a list of at most {len(ascii_uppercase)} texts, or a mapping with keys "
            "A to Z"
        )
    return {_letter(key): normalised(str(text)) for key, text in given.items()}


def _true_letters(rollout: Rollout, options: Mapping[str, str]) -> set[str]:
    truth, row = rollout.prompt.ground_truth, rollout.prompt.id
    known = options or ascii_uppercase
    if isinstance(truth, list | tuple) and truth and all(_letter(one) in known for one in truth):
        return {_letter(one) for one in truth}
    text = found.text if isinstance(truth, str) and (found := find(wide_folded(truth))) else str(truth)
    if (letter := _letter(text)) and letter in known:
        return {letter}
    matching = {key for key, option in options.items() if option == normalised(text)}
    if not matching and (labelled := _LABELLED.fullmatch(text.strip())):
        matching = {labelled[1]} if not options or options.get(labelled[1]) == normalised(labelled[2]) else set()
    if not matching and isinstance(truth, str):
        matching = _all_of(text, frozenset(known))
        matching = matching if sorted(matching) == re.findall(r"[A-Z]", text.replace("and", "")) else set()
    elif len(matching) > 1:
        matching = set()
    if not matching:
        raise Invalid(
            f"the ground truth of row {row} is {truth!r}; it must be the letter (A to Z) or the text of one option, or "
            "the letters of several options"
        )
    return matching


def _letter(value: Any) -> str:
    """Returns the letter in a value such as "B", "(b)" or "B."; "" for any other value."""
    bare = value.strip().strip("().:").upper() if isinstance(value, str) else ""
    return bare if len(bare) == 1 and bare in ascii_uppercase else ""
