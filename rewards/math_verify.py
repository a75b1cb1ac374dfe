"""Reward `math_verify`: 1.0 if the answer's last result equals the ground truth, according to the library
Math-Verify and the rules of this module."""

# ruff: noqa: RUF001  # punctuation of several scripts

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field

from rewards import Invalid, Rollout, Score, reward, units
from rewards.answer import WINDOW, bold, find
from rewards.math_text import Form, approximations, chemical, form, forms_equal, is_time, plain, spaced, without_percent
from rewards.math_values import TooMuch, as_float, containers_equal, digits, exact, numbers_equal
from rewards.text import normalised, plain_number

LONGEST_BOX = 2000  # maximum number of characters of a result; the library's patterns are slow for longer texts
LONGEST_PROSE = 1500
LONGEST_BARE = 200
# A ground truth or an answer beyond this limit, or beyond those of math_values.py, takes too long to compare.
DEEPEST = 10  # maximum depth of nested brackets

_BASED = re.compile(r"\(?([0-9A-Z]{1,99})\)?_(?:(\d)|\{(\d{1,2})\})")
_ENDING = re.compile(r"(?:\$([^$\n]{1,200})\$|\\\(([^\n]{1,200}?)\\\))[\s.*]{0,9}\Z")
_WORD = re.compile(r"[A-Za-z]{3,99}|[Nn]o|NO")
_EAGER = re.compile(r"binom|choose|gcd|lcm")  # the library evaluates these functions while it parses them
_TOO_MUCH_FOR_EAGER = re.compile(
    r"\d{5}|\^ ?\{[^}]{0,99}[\^!]|[)}!]!|binom(?!\{[\w+ -]{1,9}\}\{[\w+ -]{1,9}\})|\^.{0,9}\\choose|choose.{0,9}\^"
)


def _as_response(truth: object) -> str:
    """Converts a ground truth into a response: puts it in a box. A ground truth that has a mark stays unchanged."""
    text = _text_of(truth)
    found = find(text, len(text))
    return text if found and found.mark else f"\\boxed{{{text}}}"


def _text_of(truth: Any) -> str:
    return plain_number(truth) if isinstance(truth, float) else str(truth)


@dataclass(frozen=True)
class Truth:
    """A ground truth, prepared for comparisons."""

    text: str  # the result of `plain` without its percent sign and its unit
    unit: str | None
    percent: bool
    words: str | None  # the normalised text if it is one word or no mathematics, else None
    form: Form | None  # if the ground truth is no calculation
    values: Sequence[list[Any]]  # one list of expressions for each reading; empty if the text is no mathematics


@reward("math_verify", on_timeout="lowest", verifiable=_as_response)
class MathVerify:
    """1.0 if the answer equals the ground truth as mathematics: 1/2, 0.5 and \\frac{2}{4} are the same.

    The marked part of the answer is compared (see rewards/answer.py). If nothing is marked, these results count: the
    last result that the library finds in the text, the last text in bold, and the whole answer if it is short. The
    value is 1.0 if one of them is equal to the ground truth.

    The library parses and compares expressions. These rules replace or complete its own:

    - Exact numbers are equal only if they are the same. A decimal is equal to a number that has the same value. A
      decimal with at least `significant` significant digits is also equal to a number that it is the rounding of:
      0.333333 equals 1/3, and 0.33 does not. In `2\\sqrt{3} \\approx 3.46`, both sides count.
    - A unit belongs to the result. A value in another unit is converted, so 500 cm equals 5 m, and 5 cm does not.
      Degrees and radians are not converted. If answer or ground truth has no unit, the numbers are compared. Words
      that are no known unit, such as "apples", are ignored. The library pint knows the units.
    - 35% equals both 35 and 0.35.
    - These are no calculations, and are equal only to the same: a range, date or score such as 10-15 (but "10 to 15"
      equals 10-15), a time, a list with dots, a chemical formula. A ratio such as 6:8 equals 3:4 and 3/4.
    - Words are compared letter by letter, because the library reads them as products of variables.
    - Two numbers with a base, such as 52_8, are equal only if digits and base are the same.
    - A ground truth that is plain text and no mathematics is compared as in `exact`.

    A row is invalid if its ground truth is LaTeX that cannot be parsed, or if comparing the ground truth with an answer
    would take too long.

    The library's own time limits are off. They use SIGALRM, which cannot interrupt a long operation inside one
    bytecode, and which fails outside the main thread. Instead, the runner kills a process that exceeds the time limit
    of a sample.
    """

    def __init__(self, significant: Annotated[int, Field(ge=1)] = 6):
        self.significant = significant

    def setup(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # hides the warning that the time limits are off
        units.prepare()
        self._truth = lru_cache(maxsize=256)(self._read_truth)
        self._verify(
            self._parse("\\boxed{1}"), self._parse("\\boxed{1}")
        )  # the first call builds grammars, which takes long

    def __call__(self, rollout: Rollout) -> Score:
        ground_truth, row = rollout.prompt.ground_truth, rollout.prompt.id
        if not isinstance(ground_truth, str | int | float):
            raise Invalid(f"math_verify needs LaTeX or a number as ground truth; row {row} has {ground_truth!r}")
        truth = self._truth(_text_of(ground_truth), row)
        results, prose = self._results(rollout.answer)
        details = {"answer": (results[0] if results else prose or "")[:200]}
        if any(len(result) > LONGEST_BOX for result in results):
            return Score(0.0, {"why": f"a result of more than {LONGEST_BOX} characters"})
        try:
            right = any(self._result_equals(truth, part) for one in results for part in approximations(one))
            right = right or (prose is not None and self._prose_equals(truth, prose))
        except TooMuch as e:
            return Score(0.0, {"why": f"the answer leads to {e}", **details})
        except RecursionError:
            return Score(0.0, {"why": "the answer has too many nested levels", **details})
        return Score(float(right), details)

    def _results(self, answer: str) -> tuple[list[str], str | None]:
        """Returns the results of an answer, and the text in which the library searches for one more result."""
        found = find(answer, WINDOW)
        if found and found.mark == "box":
            return [found.text], None
        marked = found is not None and found.mark is not None
        text = found.text.partition("\n\n")[0] if found and marked else answer  # an explanation may follow
        if len(text) > LONGEST_PROSE:
            text = text[-LONGEST_PROSE:]
            # the text must start at a new line, because a cut inside a formula would leave a single dollar sign
            text = text.partition("\n")[2] or text
        if ending := _ENDING.search(text):
            return [(ending[1] or ending[2]).strip()], text
        line = text.strip("*$ \n") if found else ""
        if marked and not line.startswith("\\begin"):
            line = line.partition("\n")[0].strip("*$ \n")
        usable = line and len(line) <= LONGEST_BARE and "\n" not in line and "$" not in line.replace(r"\$", "")
        emphasised = None if marked else bold(text)
        return [*([line] if usable else []), *([emphasised] if emphasised else [])], text

    def _read_truth(self, given: str, row: str) -> Truth:
        """Prepares a ground truth. Raises Invalid if no answer can be compared with this ground truth."""

        def refuse(why: str) -> Invalid:
            return Invalid(f"the ground truth of row {row} {why}: {given[:200]!r}")

        found = find(given, len(given))
        whole = found.text if found and found.mark else given
        text, unit, percent = self._split(whole)
        if len(text) > LONGEST_BOX:
            raise refuse(f"has more than {LONGEST_BOX} characters")
        if _depth(text) > DEEPEST:
            raise refuse(f"has more than {DEEPEST} levels of nested brackets")
        if _EAGER.search(text) and _TOO_MUCH_FOR_EAGER.search(text):
            raise refuse("has a binomial coefficient or a common divisor with large or nested numbers")
        special = form(text)
        readings = [one for part in approximations(text) for one in _readings(part, percent)]
        values = [self._parse(reading) for reading in readings]
        mathematics = [value for parsed in values for value in parsed if not isinstance(value, str)]
        if not normalised(text) or (not mathematics and not special and any(c in text for c in "\\{}")):
            raise refuse("does not parse as mathematics")
        try:
            _ = [digits(one) for one in mathematics]
        except TooMuch as e:
            raise refuse(f"leads to {e}, which takes too long to evaluate") from None
        except RecursionError:
            raise refuse("has too many nested levels") from None
        words = normalised(text) if not mathematics or _WORD.fullmatch(text) else None
        return Truth(text, unit, percent, words, special, values if mathematics else [])

    def _split(self, result: str) -> tuple[str, str | None, bool]:
        """Returns the text of a result for the library, its unit if it has one, and True if it had a percent sign."""
        measured = units.split(result)
        if measured:
            text, percent = without_percent(plain(measured.number))
            return text, measured.unit, percent
        text, percent = without_percent(plain(units.without_counter(result)))
        if not percent and (
            measured := units.split(text)
        ):  # a unit that only `plain` makes visible: full-width, in $...$
            return plain(measured.number), measured.unit, False
        return text, None, percent

    def _result_equals(self, truth: Truth, result: str) -> bool:
        text, unit, percent = self._split(result)
        if unit and truth.unit and not units.comparable(truth.unit, unit):
            return False
        if percent == truth.percent and unit == truth.unit and (text == truth.text or normalised(text) == truth.words):
            return True
        if truth.words and normalised(text) == truth.words:
            return True
        if (ours := chemical(truth.text, expected=True)) and ours == chemical(text, expected=True):
            return True
        special = chemical(text, expected=True) if truth.form and truth.form.kind == "chemical" else form(text)
        if truth.form or special:
            equal = self._forms_equal(truth, special, text)
            if equal is not None:
                return equal
        if not truth.values:
            return False
        values = truth.values[:1] if percent else truth.values
        given = [self._parse(reading) for reading in _readings(text, percent and not truth.percent)]
        if unit and truth.unit and not units.same(truth.unit, unit):
            return any(self._converted_equal(true, unit, truth.unit, one) for true in values for one in given if one)
        return any(self._equal(truth, true, one) for true in values for one in given if one)

    def _prose_equals(self, truth: Truth, text: str) -> bool:
        """True if the last result that the library finds in a text equals the ground truth."""
        found = self._parse(spaced(text))
        if not found or not truth.values:
            return False
        if isinstance(found[-1], str):
            start = text.rfind(found[-1])
            measured = _measured_there(text[start:], len(found[-1])) if truth.unit and start >= 0 else None
            if measured or truth.form or form(plain(found[-1])):
                return self._result_equals(truth, measured or found[-1])
        return any(self._equal(truth, true, found) for true in truth.values)

    def _forms_equal(self, truth: Truth, special: Form | None, text: str) -> bool | None:
        """Compares results of which at least one is no calculation. Returns None if the library has to compare them."""
        if truth.form is None or special is None:
            one = truth.form or special
            assert one
            # a ratio is also a fraction, and "10 - 15" with blanks may be a difference if the other result is a number
            difference = truth.form is None and re.search(r"\d - \d", text) is not None
            return None if (one.kind == "ratio" and not is_time(one)) or difference else False
        equal = forms_equal(truth.form, special)
        if equal is not None:
            return equal
        pairs = zip(truth.form.parts, special.parts, strict=True)
        return all(a == b or (a != "..." != b and self._expressions_equal(a, b)) for a, b in pairs)

    def _expressions_equal(self, true: str, given: str) -> bool:
        ours, theirs = (self._parse(f"\\boxed{{{plain(text)}}}") for text in (true, given))
        return bool(ours and theirs) and self._values_equal(ours, theirs)

    def _converted_equal(self, true: list[Any], unit: str, true_unit: str, found: list[Any]) -> bool:
        """True if two values in different units are equal."""
        ours, theirs = as_float(_right_side(true[0])), as_float(_right_side(found[0]))
        if ours is None or theirs is None:
            return False
        value = units.converted(theirs, unit, true_unit)
        return abs(value - ours) <= 0.5 * 10.0 ** (1 - self.significant) * max(abs(value), abs(ours)) * 0.1

    def _equal(self, truth: Truth, value: list[Any], found: list[Any]) -> bool:
        """True if two parsed results are equal. Words, and numbers with a base, are compared as texts. The last item of
        `found` is the text that the library parsed."""
        text = plain(found[-1]) if isinstance(found[-1], str) else ""
        if truth.words and text.isascii() and text.isalpha():
            return normalised(text) == truth.words
        if (ours := _based(truth.text)) and (theirs := _based(text)):
            return ours == theirs
        return self._values_equal(value, found)

    def _values_equal(self, true: list[Any], found: list[Any]) -> bool:
        ours, theirs = true[0], found[0]
        if isinstance(ours, str) or isinstance(theirs, str):
            return self._verify(true, found)
        _ = digits(theirs)
        left, right = _right_side(ours), _right_side(theirs)
        try:
            if not (_is_equation(ours) and _is_equation(theirs)):
                equal = numbers_equal(left, right, self.significant)
                if equal is not None:
                    return equal
            if containers_equal(ours, theirs, self.significant):
                return True
            ours, theirs = exact(ours), exact(theirs)
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            pass  # sympy fails on some expressions without a value; the library, which expects this, compares them
        return self._verify([ours], [theirs])

    def _parse(self, text: str) -> list[Any]:
        """Returns the sympy expressions in `text`, then the text of the first expression; [] if `text` has no
        mathematics."""
        from math_verify import parse  # imported here because it takes a second, and only worker processes need it

        return parse(text, parsing_timeout=0)  # 0 means no time limit

    def _verify(self, truth: list[Any], found: list[Any]) -> bool:
        from math_verify import verify

        return verify(truth, found, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=0)


def _measured_there(text: str, length: int) -> str | None:
    """Returns the number of `length` characters at the beginning of a text together with the unit after it, or None if
    no unit follows."""
    ends = re.search(r"[.,;:!?。，；]?(?=\s|$)|[。，；]", text[length + 2 : length + 40])
    candidates = [text[: length + 2 + ends.start()]] if ends else []
    return next((one for one in candidates if units.split(one)), None)


def _right_side(expression: Any) -> Any:
    """Returns 5 for x = 5, and any other expression unchanged. For a chain, returns its last part."""
    from math_verify.grader import is_assignment_relation, take_last_relation

    return take_last_relation(expression).rhs if is_assignment_relation(expression) else expression


def _is_equation(expression: Any) -> bool:
    from math_verify.grader import is_equation

    return bool(is_equation(expression))


def _based(text: str) -> tuple[str, str] | None:
    """Splits a number with a base, such as 52_8, into ("52", "8"). Returns None for other text."""
    return (match[1], match[2] or match[3]) if (match := _BASED.fullmatch(text)) else None


def _depth(text: str) -> int:
    """Returns how deep brackets of any kind are nested."""
    deepest = now = 0
    for character in text:
        now += (character in "([{") - (character in ")]}")
        deepest = max(deepest, now)
    return deepest


def _readings(text: str, percent: bool) -> list[str]:
    """Returns the texts that the library parses for a result: the result itself and, if it had a percent sign, also the
    result divided by 100."""
    return [f"\\boxed{{{text}}}", *([rf"\boxed{{\frac{{{text}}}{{100}}}}"] if percent else [])]
