"""Reward `choice`: 1.0 if the answer picks the right option (A to Z), else 0.0."""

# ruff: noqa: RUF001  # punctuation and words of several scripts

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
_DECORATION = r"(?:[\s*_(\[{\"'`$【「『“‘✅✔☑➡→>-]|\\(?:text|textbf|mathbf|mathrm|boxed)\{|\\[(\[])*+"
_CLOSING = r"[)\].:,;*_}\"'`$、。】」』”’?!-]"
_WORD = (
    r"(?:(?:(?i:(?:the\s|la\s|l['’]|die\s|therefore\s)?(?:(?:option|choice|letter|opción|opção)\s{1,4}))|(?i:la|le|die)\s"
    r"|选项|選項|选择|選擇)\s{0,4})?+"
)
_NOT_IN_WORD = r"(?![A-Za-z0-9_'\u2019-])"
_FIRST = re.compile(rf"{_DECORATION}{_WORD}{_DECORATION}([A-Z]){_NOT_IN_WORD}", re.IGNORECASE)
_LABEL_ENDS = re.compile(rf"\s{{0,8}}+(?:{_CLOSING}|\\[)\]]|$|[\u3040-\u9fff\uac00-\ud7af])")
_JOINED = (
    r"(?i:and/or|or|and|oder|und|ou|et|y|e|o)\b\s{0,4}(?:(?:maybe|perhaps|possibly|probably|also|even)\b)?"
    r"|或者|以及|还是|または|또는|이나|[,;/&+、|或和与及跟とや와과]"
)
# Finds a further letter directly after a letter. The first alternative needs a comma or a word such as "or" before the
# letter: it finds B in "A,B" and "A or B". The second alternative needs a mark such as a bracket, the end of the text
# or one more letter after the letter: it finds B in "(A) (B)", "A B" and "A B C".
_FURTHER = re.compile(
    rf"(?:(?![,、]){_CLOSING}|\s|\(){{0,12}}+(?:{_JOINED})\s{{0,8}}+(?:{_JOINED})?\s{{0,8}}+{_WORD}[*_(\[{{\"'`$]{{0,8}}+([A-Z])"
    rf"{_NOT_IN_WORD}(?!\s{{1,4}}(?!or\b|and\b|oder\b|und\b|ou\b|et\b)[a-z])"
    rf"|(?:{_CLOSING}|\s){{0,12}}+[*_(\[{{\"'`$]{{0,8}}+([A-Z])(?={_CLOSING}|\s{{0,8}}$|\s{{1,4}}[A-Z]\b)"
)
_ANYWHERE = re.compile(
    rf"\(([A-Za-z])\)|([A-Z])(?:选项|选項|项)(?:正确|符合|是对|对)|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{{1,4}}+([A-Z])\b|(?:选项|選項|选择|選擇)\s?([A-Z])(?![A-Za-z])"
    rf"|(?<![A-Za-z0-9_'\u2019-])(?:([B-HJ-Z]){_NOT_IN_WORD}|([AI])(?=[)\].:,;*_}}、。】?!]|\s{{0,8}}(?:$|[,;/&+]|or\b|and\b)))"
)
_ALONE = re.compile(rf"{_DECORATION}{_WORD}{_DECORATION}([A-Z])(?:{_CLOSING}|\\[)\]]|\s){{0,12}}+")
_SEVERAL = re.compile(r"[A-Z](?:(?:\s{0,4}[,;、&/+]\s{0,4}|\s{1,4}and\s{1,4}|\s{0,4})[A-Z]){1,25}")
# Finds the letters of several options that are written with their texts: "A. cat\nB. dog", "A (cat) and B (dog)".
_WITH_TEXT = re.compile(
    r"(?:^|[\n,;]|\b(?:and|or)\b)[\s*(-]{0,6}([A-Z])\s?(?:[).:、]|(?=\((?![A-Z]\))))(?=.{0,200}?\w)", re.MULTILINE
)
# What is said of options that are not picked: "not A", "A is wrong", "A选项错误".
_REJECTED = re.compile(
    r"(?i:\b(?:not|isn['’]t|can['’]t be|cannot be|can not be|nicht|no es|n['’]est pas|neither|nor))\s{1,3}"
    r"(?i:option\s)?[(*\"]{0,3}[A-Z]\b[)*\"]{0,3}"
    r"|(?:不是|不应?该?选|误选|誤選|不选)\s?[(]?[A-Z](?![A-Za-z])[)]?"
    r"|(?i:option\s)?[(*]{0,3}\b[A-Z]\b[)*]{0,3}\s(?i:is|was|are)\s(?i:wrong|incorrect|false|not|too\b|out\b)[^.,;\n]{0,60}"
    r"|[A-Z](?:、[A-Z]){0,9}(?:都)?不是|[(]?[A-Z][)]?\s?(?:选项|項|项)?(?:是)?(?:错误|错|不正确|不对|不符合?)(?:的)?|[A-Z](?:では(?:ありません|ない)|[가이]?\s?아닙니다)"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]*)\}|\\[ ,;!]|~")
# words after the letter A or I which tell that it is a letter: "A because ..."
_AFTER_LETTER = re.compile(r"\s{0,4}\(|\s{1,4}(?:because|since|as|for|due|which|is|and|or|oder|und|ou|with)\b")
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
    text = _WRAPPED.sub(lambda part: f" {part[1] or ''} ", found.text)
    letters = _all_of(text, known) if len(true) > 1 else set()
    letters = letters or (_marked if found.mark else _unmarked)(text, options) & known
    if len(letters) != len(true):
        return Score(
            0.0, {"why": "several choices" if letters else "no choice in the answer", "answer": found.text[:200]}
        )
    return Score(float(letters == true), {"choice": "".join(sorted(letters))})


def _marked(text: str, options: Mapping[str, str]) -> set[str]:
    """Returns the letters that the marked part of an answer picks."""
    if letter := _option_text(text, options) or _option_text(text.partition("\n")[0], options):
        return {letter}
    text = _REJECTED.sub(" ", text)
    first = _FIRST.match(text)
    if first and _is_letter(text, first):
        return _from(text, first)
    line = text.strip().partition("\n")[0]
    return {"".join(found).upper() for found in _ANYWHERE.findall(line)}


def _unmarked(text: str, options: Mapping[str, str]) -> set[str]:
    """Returns the letters that an answer without a mark picks."""
    if letter := _option_text(text, options):
        return {letter}
    if alone := _lines_alone(text):
        return alone
    text = _REJECTED.sub(" ", text)
    parts = [bold(text), last_line(text)] if "\n" in text.strip() or "**" in text else []
    for part in filter(None, parts):
        if option := _option_text(part, options):
            return {option}
        label = _FIRST.match(part)
        if label and _LABEL_ENDS.match(part, label.end()):
            return _from(part, label)
    first = _FIRST.match(text)
    if first and (
        _LABEL_ENDS.match(text, first.end()) or first[1] in ascii_uppercase.replace("A", "").replace("I", "")
    ):
        return _from(text, first)
    return {"".join(found).upper() for found in _ANYWHERE.findall(text)}


def _is_letter(text: str, first: re.Match[str]) -> bool:
    """True if `first` is the letter of an option, and not the word "a" or "I" before another word."""
    if _LABEL_ENDS.match(text, first.end()) or first[1] not in "AaI":
        return True
    return first[1] != "a" and _AFTER_LETTER.match(text, first.end()) is not None


def _from(text: str, first: re.Match[str]) -> set[str]:
    """Returns the letter that `first` matches, and the letters directly after it, or after the texts of the options."""
    letters, end = {first[1].upper()}, first.end()
    while further := _FURTHER.match(text, end):
        letters.add(further[1] or further[2])
        end = further.end()
    paragraph = text[first.start() :].strip().partition("\n\n")[0]
    return letters | {letter.upper() for letter in _WITH_TEXT.findall(paragraph)}


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
    plain = re.sub(r"[*`$()\[\]]|[.。]$", "", text.strip())
    return set(re.findall(r"[A-Z]", plain.replace("and", ""))) & known if _SEVERAL.fullmatch(plain) else set()


def _option_text(text: str, options: Mapping[str, str]) -> str:
    """Returns the first letter whose option has this text, or "". A single letter is read as the letter of an option,
    not as its text."""
    plain = normalised(text).strip("\"'\u201c\u201d\u2018\u2019「」")
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
    return {_letter(key): _without_label(_letter(key), normalised(str(text))) for key, text in given.items()}


def _without_label(letter: str, option: str) -> str:
    """Removes the letter from an option that is given as "B. dog"."""
    labelled = _LABELLED.fullmatch(option.upper())
    return option[-len(labelled[2]) :] if labelled and labelled[1] == letter else option


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
