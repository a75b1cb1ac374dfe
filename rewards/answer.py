"""Finds the answer in a response. All rewards that compare text use this module.

A mark is a notation by which a writer says "this is my answer". These are marks:

    box     `\\boxed{...}` or `\\fbox{...}`
    tag     `<answer>...</answer>`; without `</answer>`, the text after `<answer>`
    hashes  a line `#### ...`, as in GSM8K. A heading of this form counts only if it is the last line
    label   "Answer:", "Final answer:", "Correct option:" and similar words in the languages of _LABEL_WORDS, also as
            a heading; the answer is the text after it
    phrase  "the answer is ...", "正确答案是", "故选", "Die Antwort ist" and similar

The mark that ends last counts, whatever its kind. There is one exception: a phrase counts after another mark only if a
number, a formula or a capital letter follows it, because a sentence such as "The answer is consistent with this" is no
answer. If the marked text contains marks itself, the last of these counts, and so on.

The time of each function is linear in the length of the text.
"""

# ruff: noqa: RUF001  # the patterns contain punctuation and words of several scripts

import re
from dataclasses import dataclass
from typing import Literal

WINDOW = 4096
"""By default, only this many characters at the end of an answer are searched."""
DEEPEST = 4  # maximum number of marks inside each other that are opened

Mark = Literal["box", "tag", "hashes", "label", "phrase"]

# All quantifiers are bounded, so that no text makes these patterns backtrack for long.
_BLANK = r"[ \t\u00a0\u202f\u3000*_`]"
_COLON = rf"{_BLANK}{{0,6}}(?:[(（][^()（）\n]{{1,40}}[)）]{_BLANK}{{0,6}})?[:：﹕=＝]"
_QUALITY = r"(?:(?:the|my|final|correct|right|best|most likely)[ \t]{1,3}){0,3}"
_HAN = (
    r"(?:最终|最後|最后|正确|正確|标准|标准的|参考|正|解|回)?的?(?:答案|答え|解答|回答|结果|結果|结论|結論|答)"
    r"|(?:최종\s?)?(?:정답|답변|답|결과)"
)
_EUROPEAN = (
    r"(?:richtige |endgültige )?(?:antwort|endergebnis|ergebnis|lösung)"
    r"|(?:réponse|résultat)(?: finale?| correcte?)?|(?:respuesta|resultado)(?: final| correct[ao])?"
    r"|resposta(?: final| correta)?|risposta(?: finale| corretta)?|risultato|antwoord|odpowiedź|cevap"
    r"|(?:правильный )?ответ|відповідь|đáp án|الإجابة|الجواب|उत्तर"
)
_LABEL_WORDS = (
    rf"(?:\b(?:answers?|ans)\b\.?|\b(?:final|correct|right|best)[ \t]{{1,3}}(?:result|option|choice|solution)"
    rf"|(?:^|\n)[ \t>#*_-]{{0,12}}(?:result|option|choice)|{_HAN}|\b(?:{_EUROPEAN}))"
)
_LABEL = re.compile(rf"{_LABEL_WORDS}{_COLON}[ \t*_]{{0,6}}", re.IGNORECASE)
_HEADING = re.compile(
    rf"^[ \t>#*_]{{0,12}}(?:{_QUALITY}(?:answers?|result)|{_HAN}|{_EUROPEAN})[ \t*_]{{0,8}}\n", re.IGNORECASE | re.M
)
_PHRASE = re.compile(
    rf"\b(?:answer|(?:correct|right|best|final|true)[ \t]{{1,3}}(?:option|choice|result|value|number|count))(?:s|[ \t]"
    rf"{{1,3}}choice)?(?:[ \t]{{1,3}}(?:here|therefore|thus|then))?[ \t]{{1,3}}"
    rf"(?:is|are|was|equals|must be|should be|would be|will be|has to be)\b(?![ \t]{{1,3}}not\b){_BLANK}{{0,6}}[:：]?"
    r"|\b(?:option|choice)[ \t]{1,3}(?:is|was|must be|should be|would be)\b(?![ \t]{1,3}not\b)"
    rf"{_BLANK}{{0,6}}[:：]?"
    rf"|(?:最终|最后|最後|正确|正確)?的?(?:答案|结果|結果|选项)(?:应该|应当|应|就|便)?(?:是|为|為|等于|選|选)[:：]?"
    rf"|(?<![a-z])(?:故|应|應|所以|因此|综上|答案|则)?(?:应|該|该)?[选選](?:择|擇)?[:：]?(?={_BLANK}{{0,4}}[(（\[【]?[A-ZＡ-Ｚ](?![a-z]))"
    rf"|(?:答え|正解|解答|答案|結果)[はが]|(?:정답|답|결과)[은는이가]"
    rf"|\bantwort (?:ist|lautet|wäre)\b(?! nicht)|\bergebnis (?:ist|lautet|beträgt)\b(?! nicht)"
    rf"|\b(?:réponse|résultat)(?: finale?| correcte?)? est\b(?! pas)"
    rf"|\b(?:respuesta|resultado)(?: final| correct[ao])? es\b"
    rf"|\b(?:resposta|resultado)(?: final| corret[ao])? é(?!\w)|\brisposta(?: finale| corretta)? è(?!\w)",
    re.IGNORECASE,
)
# a number, a formula or a capital letter that is no word: what may follow a phrase after another mark
_COMMITTED = re.compile(
    rf"(?:{_BLANK}|[\"'“‘(（\[【])*(?:[-+−–]?[$€£¥]?[.]?\d|[\\$]"
    r"|[A-ZＡ-Ｚ](?![A-Za-zＡ-Ｚ'’])(?![ ]{1,3}(?!or\b|and\b)[a-z]))"
)
_TAG = re.compile(r"<(/?)answer\s{0,8}>", re.IGNORECASE)
_HASHES = re.compile(r"^####(?!#)[ \t]{0,8}(\S[^\n]*)$", re.MULTILINE)
_NUMBER_ALONE = re.compile(r"[-+−]?[$€£¥]?(?:\d[\d,./:]*+|\\\S+)\s?\S{0,12}\s*")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,8}+\{|\\.|[{}]", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*\n]{1,400}?)\*\*(?!\*)(?!\s{0,3}[:：])|(?<!\w)__([^_\n]{1,400}?)__(?!\w)(?!\s{0,3}[:：])")
_COPULA = re.compile(r"(?:입니다|이에요|예요|이다|です|でした|である|だ)[.。．!！]?$")
_PAIRS = (("**", "**"), ("__", "__"), ("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ("$", "$"), ("*", "*"))
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname|boldsymbol|bm|fbox"
    r"|boxed)\s?\{"
)


@dataclass(frozen=True)
class Answer:
    """The part of a response that counts. `mark` is the kind of its innermost mark, or None if nothing is marked and
    the text is the whole response. `text` has no markdown or LaTeX around it (see `bare`)."""

    text: str
    mark: Mark | None


def find(response: str, window: int = WINDOW) -> Answer | None:
    """Returns the part of a response that counts: the last mark, else the whole response. Searches only the last
    `window` characters. Returns None if the response is longer and its last `window` characters have no mark."""
    text, mark = response[-window:], None
    for _ in range(DEEPEST):
        found = _last_mark(text)
        if found is None:
            break
        text, mark = found
    if mark is None and len(response) > window:
        return None
    return Answer(bare(text), mark)


def marked_answer(response: str, window: int = WINDOW) -> str | None:
    """Returns the text of `find`, or None. For rewards that treat all marks alike."""
    found = find(response, window)
    return found.text if found else None


def last_boxed(text: str) -> str | None:
    """Returns the content of the `\\boxed{...}` or `\\fbox{...}` whose closing brace comes last, or None. Escaped
    braces are ignored."""
    span = _last_box(text)
    return text[slice(*span)].strip() if span else None


def bold(text: str) -> str | None:
    """Returns the last text in bold, for responses without a mark. A bold label before a colon does not count."""
    last = None
    for last in _BOLD.finditer(text):  # noqa: B007  # only the last match is used
        pass
    return bare(last[1] or last[2]) if last else None


def last_line(text: str) -> str:
    """Returns the last line that is not empty, for responses without a mark."""
    return bare(text.rstrip().rpartition("\n")[2])


def bare(text: str) -> str:
    """Removes markdown and LaTeX that surround the whole text, such as `**...**`, `$...$` and `\\text{...}`, and half a
    pair of `**` at one end."""
    for _ in range(8):
        before = text = text.strip()
        if text.count("**") % 2:
            text = text.removesuffix("**") if text.endswith("**") else text.removeprefix("**")
        for opening, closing in _PAIRS:
            inside = text[len(opening) : -len(closing)]
            around = len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)
            if around and opening not in inside and closing not in inside and not inside.endswith("\\"):
                text = inside
        if (opened := _WRAPPER.match(text)) and text.endswith("}") and _closes_at_end(text, opened.end()):
            text = text[opened.end() : -1]
        if text == before:
            return text
    return text


def _closes_at_end(text: str, start: int) -> bool:
    """True if the brace before `start` is closed by the last character of `text`."""
    depth = 1
    for token in _BRACES.finditer(text, start):
        depth += (token[0][-1] == "{" and token[0] != r"\{") - (token[0] == "}")
        if depth == 0:
            return token.end() == len(text)
    return False


def _last_mark(text: str) -> tuple[str, Mark] | None:
    """Returns the content and the kind of the last mark, or None."""
    strong = [mark for mark in (_box(text), _tag(text), _hashes(text), _label(text)) if mark]
    end, content, kind = max(strong, default=(-1, "", None))
    phrase = None
    for phrase in _PHRASE.finditer(text, max(end, 0)):  # noqa: B007  # only the last match is used
        pass
    if phrase:
        rest = text[phrase.end() :].strip()
        line = rest.partition("\n")[0].rstrip()
        rest = rest if _open_brackets(line) else line
        if rest and (kind is None or _COMMITTED.match(rest)):
            return _COPULA.sub("", rest), "phrase"
    return (content, kind) if kind else None


def _open_brackets(line: str) -> bool:
    return sum(line.count(one) for one in "([{") > sum(line.count(one) for one in ")]}")


_Found = tuple[int, str, Mark]  # where the mark ends, its content and its kind


def _box(text: str) -> _Found | None:
    span = _last_box(text)
    return (span[1] + 1, text[slice(*span)], "box") if span else None


def _last_box(text: str) -> tuple[int, int] | None:
    opened: list[int | None] = []  # for each open brace: the start of its content if the brace opens a box, else None
    span = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            span = (start, token.start()) if start is not None else span
        elif token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
    return span


def _tag(text: str) -> _Found | None:
    start, found = None, None
    for token in _TAG.finditer(text):
        if not token[1]:
            start = token.end()
        elif start is not None:
            found, start = (token.end(), text[start : token.start()], "tag"), None
    if start is not None and text[start:].strip():
        return start, text[start:], "tag"
    return found


def _hashes(text: str) -> _Found | None:
    end, found = len(text.rstrip()), None
    for line in _HASHES.finditer(text):
        if line.end() >= end or _NUMBER_ALONE.fullmatch(line[1]):
            found = (line.end(), line[1], "hashes")
    return found


def _label(text: str) -> _Found | None:
    last = max(
        (m.end() for pattern in (_LABEL, _HEADING) for m in pattern.finditer(text) if text[m.end() :].strip()),
        default=-1,
    )
    return (last, text[last:], "label") if last >= 0 else None
