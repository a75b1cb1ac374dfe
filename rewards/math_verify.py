"""Reward `math_verify`: 1.0 if the answer's last result equals the ground truth, according to the library
Math-Verify."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rewards import Invalid, Rollout, Score, reward
from rewards.text import WINDOW, last_boxed, marked_answer, normalised

LONGEST_BOX = 2000  # maximum number of characters of a result; the library's patterns are slow for longer texts
LONGEST_PROSE = 1500
LONGEST_BARE = 200

# A ground truth beyond these limits is refused, so that comparing it with any answer takes at most a second or two.
DEEPEST = 10  # maximum depth of nested brackets
MOST_DIGITS = 30_000  # maximum number of digits of any number during the evaluation
MOST_TERMS = 300  # maximum number of terms of a power that is expanded
MOST_ADDENDS = 10_000  # maximum number of terms of a sum or product over a range

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|bm)\s?\{")
_SEPARATOR = re.compile(r"(?<=\d)(?:\\[,! ]|\{,\})+(?=\d{3}(?!\d))")  # thousands separators: 1\,000
_MIXED = re.compile(r"(-?\d{1,9}) +(\d{1,9})/(\d{1,9})")
_REPEATING = re.compile(r"(?<![\d.])(\d{1,18})\.(\d{0,18})\\overline\{(\d{1,18})\}")
_ROOT = re.compile(r"√ ?(\d{1,99}|[a-z]|\([^()]{1,99}\))")
_SIGNS = str.maketrans({"°": r"^\circ", "²": "^2", "³": "^3", "∞": r"\infty"})
_PERCENT = re.compile(r"(?:\\?%|\\text\{ ?percent\}|\bpercent)$")
_BASED = re.compile(r"\(?([0-9A-Z]{1,99})\)?_(?:(\d)|\{(\d{1,2})\})")
_NOON = re.compile(r"(?<=:\d\d)[ ~\\]{0,2}(?:\\text\{ ?)?([ap])\.? ?m\b\.?\}?", re.IGNORECASE)  # 6:30 p.m.
_ENDING = re.compile(r"(?:\$([^$\n]{1,200})\$|\\\(([^\n]{1,200}?)\\\))[\s.*]{0,9}\Z")
_WORD = re.compile(r"[A-Za-z]{3,99}|[Nn]o|NO")
_EAGER = re.compile(r"binom|choose|gcd|lcm")  # the library evaluates these functions while it parses them
_TOO_MUCH_FOR_EAGER = re.compile(
    r"\d{5}|\^ ?\{[^}]{0,99}[\^!]|[)}!]!|binom(?!\{[\w+ -]{1,9}\}\{[\w+ -]{1,9}\})|\^.{0,9}\\choose|choose.{0,9}\^"
)


def plain(result: str) -> str:
    """Normalises a result for the library. Removes a final period, dollar signs and a `\\text{}` around the whole
    result. Rewrites notations that the library cannot read, such as blanks between groups of three digits, √ and ²."""
    text = result.replace(r"\$", "").strip("$ \n\t")
    for _ in range(4):
        if not text.endswith(".."):
            text = text.removesuffix(".").rstrip("$ ")
        opened = _WRAPPER.match(text)
        if not opened or last_boxed(rf"\boxed{{{text[opened.end() :]}") != text[opened.end() : -1].strip():
            break  # no wrapper such as `\text{...}` stands around the whole text
        text = text[opened.end() : -1].strip()
    text = _SEPARATOR.sub("", text.translate(_SIGNS).replace(r"\varnothing", r"\emptyset"))
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1].strip('()')}}}", text)
    text = _NOON.sub(lambda half: f" {half[1].lower()}.m.", _REPEATING.sub(_fraction, text))
    if mixed := _MIXED.fullmatch(text):
        text = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return text


def _fraction(repeating: re.Match[str]) -> str:
    whole, once, again = repeating.groups()
    denominator = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{denominator}}}"


def _based(text: str) -> tuple[str, str] | None:
    """Splits a number with a base, such as 52_8, into ("52", "8"). Returns None for other text."""
    return (match[1], match[2] or match[3]) if (match := _BASED.fullmatch(text)) else None


class TooMuch(Exception):
    """Raised for an expression that would take too long to evaluate. The message is the reason, for example "a number
    of more than 30000 digits"."""


def digits(expression: Any) -> float:
    """Estimates the number of decimal digits of the longest number that occurs when a sympy expression is evaluated.
    Looks only at the form of the expression, and does not evaluate it. Raises TooMuch if there are too many digits or
    terms.

    For powers, factorials, sums and products, nested in any way, the true number of digits is at most the estimate.
    Integrals, limits and similar expressions are accepted without an estimate.
    """
    if getattr(expression, "is_Rational", False):
        return math.log10(max(abs(expression.p), expression.q) + 1)
    parts = list(expression) if hasattr(expression, "tolist") else list(getattr(expression, "args", ()))
    if not parts:
        return float(getattr(expression, "is_number", False))  # a constant such as pi counts as 1 digit, a symbol as 0
    most, kind = [digits(part) for part in parts], type(expression).__name__
    if kind == "Pow":
        times = _value(parts[1])
        if (several := _addends(parts[0])) > 1 and (
            times > MOST_TERMS or math.comb(int(times) + several - 1, several - 1) > MOST_TERMS
        ):
            raise TooMuch(f"a power of more than {MOST_TERMS} terms")
        found = most[0] * times
    elif kind in ("factorial", "factorial2", "subfactorial", "gamma", "binomial"):
        largest = max(_value(part) for part in parts)
        found = largest * math.log10(largest + 1)
    elif kind in ("Sum", "Product"):
        for limits in parts[1:]:
            last = limits.args[-1]
            if len(limits.args) == 3 and last.is_infinite is not True and _value(last) > MOST_ADDENDS:
                raise TooMuch(f"a {kind.lower()} over more than {MOST_ADDENDS} numbers")
        found = max(most)
    else:
        found = sum(most) if kind == "Mul" else max(most) + math.log10(len(most))
    if found > MOST_DIGITS:
        raise TooMuch(f"a number of more than {MOST_DIGITS} digits")
    return found


def _value(expression: Any) -> float:
    """Returns the absolute value of a number, but at most 10^15. Returns 1 for an expression that is no number, such as
    x + 1. Call `digits` first, because it refuses expressions whose evaluation would take long."""
    try:
        return min(abs(complex(expression)), 1e15)
    except OverflowError:
        return 1e15
    except (TypeError, ValueError):
        return 1.0


def _addends(expression: Any) -> int:
    """Returns the number of terms of a sum, or of the longest sum in a product; 1 for any other expression."""
    kind, parts = type(expression).__name__, getattr(expression, "args", ())
    return len(parts) if kind == "Add" else max([1, *map(_addends, parts)]) if kind == "Mul" else 1


def _depth(text: str) -> int:
    """Returns how deep brackets of any kind are nested."""
    deepest = now = 0
    for character in text:
        now += (character in "([{") - (character in ")]}")
        deepest = max(deepest, now)
    return deepest


def _without_percent(text: str) -> tuple[str, bool]:
    """Removes a percent sign at the end of `text`. Returns the text, and True if there was a percent sign."""
    rest = _PERCENT.sub("", text)
    return rest.rstrip("\\ "), rest != text


def _readings(text: str, percent: bool) -> list[str]:
    """Returns the texts that the library parses for a result: the result itself and, if it had a percent sign, also the
    result divided by 100."""
    return [f"\\boxed{{{text}}}", *([rf"\boxed{{\frac{{{text}}}{{100}}}}"] if percent else [])]


def _boxed(truth: object) -> str:
    """Converts a ground truth into a response: puts it in a box. A ground truth that already has a box stays
    unchanged."""
    return text if last_boxed(text := str(truth)) else f"\\boxed{{{text}}}"


@dataclass(frozen=True)
class Truth:
    """A ground truth, prepared for comparisons."""

    text: str  # the result of `plain` without its percent sign
    percent: bool
    words: str | None  # the normalised text if it is one word or no mathematics, else None
    values: Sequence[list[Any]]  # one list of expressions for each of `_readings`; empty if the text is no mathematics


@reward("math_verify", on_timeout="lowest", verifiable=_boxed)
class MathVerify:
    """1.0 if the answer equals the ground truth as mathematics: 1/2, 0.5 and \\frac{2}{4} are the same.

    Compares the last `\\boxed{...}` of the answer. If the answer has no box, two results count. One is the last result
    that the library finds in the text. The other is the text after the last "Answer:" (or the whole answer if it is
    short); this text is read as a formula. The value is 1.0 if one of these results is equal to the ground truth. In
    four cases, the library's rules are not used. Words are compared letter by letter, because the library reads them as
    products of variables. Two numbers with a base, such as 52_8, are equal only if digits and base are the same. A
    percentage equals two numbers without a percent sign: 25% equals both 25 and 0.25. A ground truth that is plain text
    and no mathematics is compared as in `exact`. A row is invalid if its ground truth is LaTeX that cannot be parsed,
    or if comparing the ground truth with an answer would take too long.

    The library's own time limits are off. They use SIGALRM, which cannot interrupt a long operation inside one
    bytecode, and which fails outside the main thread. Instead, the runner kills a process that exceeds the time limit
    of a sample.
    """

    def setup(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # hides the warning that the time limits are off
        self._truth = lru_cache(maxsize=256)(self._read_truth)
        self._verify(
            self._parse("\\boxed{1}"), self._parse("\\boxed{1}")
        )  # the first call builds grammars, which takes long

    def __call__(self, rollout: Rollout) -> Score:
        ground_truth, row = rollout.prompt.ground_truth, rollout.prompt.id
        if not isinstance(ground_truth, str | int | float):
            raise Invalid(f"math_verify needs LaTeX or a number as ground truth; row {row} has {ground_truth!r}")
        truth = self._truth(str(ground_truth), row)
        text, formula, prose = self._result(rollout.answer)
        if len(text) > LONGEST_BOX:
            return Score(0.0, {"why": f"a result of more than {LONGEST_BOX} characters"})
        details = {"answer": text[:200]}
        result, percent = _without_percent(plain(text))
        if percent == truth.percent and (result == truth.text or normalised(result) == truth.words):
            return Score(1.0, details)
        if not truth.values:
            return Score(0.0, details)
        readings = _readings(result, percent and not truth.percent) if formula else []
        parsed = [value for reading in [*readings, *prose] if (value := self._parse(reading))]
        if not parsed:
            return Score(0.0, {"why": "no mathematics in the answer", **details})
        values = truth.values[:1] if percent else truth.values
        return Score(float(any(self._equal(truth, true, given) for true in values for given in parsed)), details)

    def _result(self, answer: str) -> tuple[str, bool, list[str]]:
        """Returns three values: the part of the answer that counts, whether this part is a formula, and the texts in
        which the library searches for formulas."""
        if (boxed := last_boxed(answer[-WINDOW:])) is not None:
            return boxed, True, []
        prose = answer[-LONGEST_PROSE:]
        if len(prose) < len(answer):
            prose = (
                prose.partition("\n")[2] or prose
            )  # the text must start at a new line, because a cut inside a formula would leave a single dollar sign
        bare = (marked_answer(answer) or "").strip("*$ \n")
        if ending := _ENDING.search(prose):
            return (ending[1] or ending[2]).strip(), True, [prose]
        if not bare or len(bare) > LONGEST_BARE or "$" in bare.replace(r"\$", "") or "\n" in bare:
            return prose[-LONGEST_BARE:], False, [prose]
        return bare, True, [prose]

    def _read_truth(self, given: str, row: str) -> Truth:
        """Prepares a ground truth. Raises Invalid if no answer can be compared with this ground truth."""

        def refuse(why: str) -> Invalid:
            return Invalid(f"the ground truth of row {row} {why}: {given[:200]!r}")

        text, percent = _without_percent(plain(last_boxed(given) or given))
        if len(text) > LONGEST_BOX:
            raise refuse(f"has more than {LONGEST_BOX} characters")
        if _depth(text) > DEEPEST:
            raise refuse(f"has more than {DEEPEST} levels of nested brackets")
        if _EAGER.search(text) and _TOO_MUCH_FOR_EAGER.search(text):
            raise refuse("has a binomial coefficient or a common divisor with large or nested numbers")
        values = [self._parse(reading) for reading in _readings(text, percent)]
        mathematics = [one for one in values[0] if not isinstance(one, str)]
        if not normalised(text) or (not mathematics and any(c in text for c in "\\{}")):
            raise refuse("does not parse as mathematics")
        try:
            _ = [digits(one) for one in mathematics]
        except TooMuch as e:
            raise refuse(f"leads to {e}, which takes too long to evaluate") from None
        except RecursionError:
            raise refuse("has too many nested levels") from None
        words = normalised(text) if not mathematics or _WORD.fullmatch(text) else None
        return Truth(text, percent, words, values if mathematics else [])

    def _equal(self, truth: Truth, value: list[Any], found: list[Any]) -> bool:
        """True if two parsed results are equal. Words, and numbers with a base, are compared as texts. The library
        compares all other results. The last item of `found` is the text that the library parsed."""
        text = plain(found[-1]) if isinstance(found[-1], str) else ""
        if truth.words and text.isascii() and text.isalpha():
            return normalised(text) == truth.words
        if (ours := _based(truth.text)) and (theirs := _based(text)):
            return ours == theirs
        return self._verify(value, found)

    def _parse(self, text: str) -> list[Any]:
        """Returns the sympy expressions in `text`, then the text of the first expression; [] if `text` has no
        mathematics."""
        from math_verify import parse  # imported here because it takes a second, and only worker processes need it

        return parse(text, parsing_timeout=0)  # 0 means no time limit

    def _verify(self, truth: list[Any], found: list[Any]) -> bool:
        from math_verify import verify

        return verify(truth, found, allow_set_relation_comp=True, timeout_seconds=0)
