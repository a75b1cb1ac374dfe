"""Finds the answer in a response. All rewards that compare text use this module.

A mark is a notation by which a writer says "this is my answer". These are marks:

    box     `\\boxed{...}` or `\\fbox{...}`
    tag     `<answer>...</answer>`; without `</answer>`, the text after `<answer>`
    hashes  a line `#### ...`, as in GSM8K. A heading of this form counts only if it is the last line
    label   "Answer:", "Final answer:", "Correct option:" and similar words in the languages of _LABEL_WORDS, also as
            a heading; the answer is the text after it
    phrase  "the answer is ...", "正确答案是", "故选", "Die Antwort ist" and similar

The mark that ends last counts, whatever its kind. There are two exceptions. A phrase counts after another mark only if
a number, a formula or a capital letter follows it, because a sentence such as "The answer is consistent with this" is
no answer. A phrase does not count if the words before it speak of another answer, as in "a wrong answer is 5". If the
marked text contains marks itself, the last of these counts, and so on.

The time of each function is linear in the length of the text.
"""

# ruff: noqa: RUF001  # the patterns contain punctuation and words of several scripts

import re
from dataclasses import dataclass
from typing import Literal

WINDOW = 4096
"""By default, only this many characters at the end of an answer are searched."""
BEGINNING = 40  # a phrase that starts after fewer characters begins a text
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
_LABEL = re.compile(
    rf"(?:{_LABEL_WORDS}{_COLON}|[【\[](?:{_HAN})[】\]][:：]?)[ \t]{{0,6}}(?:\*\*|__|\*(?=\s))?[ \t]{{0,4}}",
    re.IGNORECASE,
)
_HEADING = re.compile(
    rf"^[ \t>#*_]{{0,12}}(?:{_QUALITY}(?:answers?|result)|{_HAN}|{_EUROPEAN})[ \t*_]{{0,8}}\n", re.IGNORECASE | re.M
)
_PHRASE = re.compile(
    r"(?:\b(?:answer|(?:correct|right|best|final|true)[ \t]{1,3}(?:option|choice|result|value|number|count))"
    r"(?:s|[ \t]{1,3}choice)?(?:[ \t]{1,3}(?:here|therefore|thus|then))?[ \t]{1,3}"
    r"(?:is|are|was|equals|must be|should be|would be|will be|has to be)\b(?![ \t]{1,3}not\b)"
    r"|\b(?:option|choice)[ \t]{1,3}(?:is|was|must be|should be|would be)\b(?![ \t]{1,3}not\b)"
    r"|(?:最终|最后|最後|正确|正確)?的?(?:答案|结果|結果|选项)(?:应该|应当|应|就|便)?(?:是|为|為|等于|選|选)"
    rf"|(?<![a-z])(?:故|应|應|所以|因此|综上|答案|则)?(?:应|該|该)?[选選](?:择|擇)?(?=[:：]?{_BLANK}{{0,4}}[(（\[【]?"
    r"(?-i:[A-ZＡ-Ｚ](?![a-z])))"
    r"|(?:答え|正解|解答|答案|結果)[はが]|(?:정답|답|결과)[은는이가]"
    r"|\b(?:antwort|lösung|ergebnis) (?:ist|lautet|wäre|beträgt)\b(?! nicht)"
    r"|\b(?:réponse|résultat)(?: finale?| correcte?)? est\b(?! pas)"
    r"|(?<!no )\b(?:respuesta|resultado)(?: final| correct[ao])? es\b"
    r"|\b(?:resposta|resultado)(?: final| corret[ao])? é(?!\w)|\brisposta(?: finale| corretta)? è(?!\w)"
    rf"){_BLANK}{{0,4}}[:：、,]?",
    re.IGNORECASE,
)
# a number, a formula or a capital letter that is no word: what may follow a phrase after another mark
_COMMITTED = re.compile(
    rf"(?:{_BLANK}|[\"'“‘(（\[【])*(?:[-+−–]?[$€£¥]?[.]?\d|[\\$]"
    r"|[A-ZＡ-Ｚ](?![A-Za-zＡ-Ｚ'’])(?![ ]{1,3}(?!or\b|and\b)[a-z]))"
)
# words before a phrase which tell that another answer than the writer's own is meant
_NOT_OURS = re.compile(
    r"(?:\b(?:wrong|incorrect|false|tempting|attractive|other|another|second|third|previous|earlier|first|initial|original"
    r"|old|common|popular|likely|plausible|possible|alternative|falsche|mauvaise|incorrecta|no|not)\b[ \t]{1,3}"
    r"(?:best[ \t]{1,3})?(?:\w{1,12}[ \t]{1,3})?"
    r"|n['’]t[ \t]{1,3}|(?:错误的?|不应?该?|不能|误|誤|若|如果|假如|别|未)[^，。,.\n]{0,2})$",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer\s{0,8}>", re.IGNORECASE)
_HASHES = re.compile(r"^####(?!#)[ \t]{0,8}(\S[^\n]*)$", re.MULTILINE)
_NUMBER_ALONE = re.compile(r"[-+−]?[$€£¥]?(?:\d[\d,./:]*+|\\\S+|[A-Z]$)\s?\S{0,12}\s*")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,8}+\{|\\.|[{}]", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*\n]{1,400}?)\*\*(?!\*)|(?<!\w)__([^_\n]{1,400}?)__(?!\w)")
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
        found = _last_mark(text, inside=mark is not None)
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


def outermost(response: str, window: int = WINDOW) -> str | None:
    """Returns the content of the last `<answer>` tag or box, without a search for marks inside, or None."""
    text = response[-window:]
    found = max(filter(None, (_tag(text), _box(text))), default=None)
    return found[1].strip() if found else None


def last_boxed(text: str) -> str | None:
    """Returns the content of the `\\boxed{...}` or `\\fbox{...}` whose closing brace comes last, or None. Escaped
    braces are ignored."""
    span = _last_box(text)
    return text[slice(*span)].strip() if span else None


def bold(text: str) -> str | None:
    """Returns the last text in bold, for responses without a mark. A bold label before a colon does not count."""
    last = None
    for match in _BOLD.finditer(text):
        is_label = (match[1] or match[2]).rstrip().endswith((":", "：")) or text[match.end() : match.end() + 4].lstrip(
            " "
        )[:1] in (":", "：")
        last = last if is_label else match
    return bare(last[1] or last[2]) if last else None


def last_line(text: str) -> str:
    """Returns the last line that is not empty, for responses without a mark."""
    return bare(text.rstrip().rpartition("\n")[2])


def bare(text: str) -> str:
    """Removes markdown and LaTeX that surround the whole text, such as `**...**`, `$...$` and `\\text{...}`, and half a
    pair of `**` at one end."""
    for _ in range(8):
        before = text = text.strip()
        if text.count("**") % 2:  # half of a pair: the other half stood before the mark
            text = text.removesuffix("**") if text.endswith("**") else text.removeprefix("**")
        for opening, closing in _PAIRS:
            inside = text[len(opening) : -len(closing)]
            around = len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)
            unescaped = inside.replace("\\$", "")
            if around and opening not in unescaped and closing not in unescaped and not inside.endswith("\\"):
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


def _last_mark(text: str, inside: bool) -> tuple[str, Mark] | None:
    """Returns the content and the kind of the last mark, or None. `inside` is True for text inside a mark. There, a
    phrase without a number, formula or letter counts only if it begins the text."""
    strong = [mark for mark in (_box(text), _tag(text), _label(text)) if mark]
    if (line := _hashes(text)) and ((not strong and not inside) or _NUMBER_ALONE.fullmatch(line[1])):
        strong.append(line)
    end, content, kind = max(strong, default=(-1, "", None))
    said = None
    for phrase in _PHRASE.finditer(text, max(end, 0)):
        rest = text[phrase.end() :].strip()
        line_end = rest.partition("\n")[0].rstrip()
        if not line_end or _NOT_OURS.search(text, max(0, phrase.start() - 40), phrase.start()):
            continue
        committed = phrase[0].endswith((":", "：")) or _COMMITTED.match(rest) is not None
        begins = not inside or (phrase.start() < BEGINNING and "\n" not in text[: phrase.start()].lstrip())
        if committed or (kind is None and begins and not (said and said[1])):
            said = (rest if _open_brackets(line_end) else line_end), committed
    if said:
        return _COPULA.sub("", said[0]).removesuffix("。").replace("**.", "**"), "phrase"
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
