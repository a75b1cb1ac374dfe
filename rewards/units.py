"""Splits a measured value, such as "5 cm" or `9.8\\,\\mathrm{m/s^2}`, into a number and a unit, and compares units.

The library pint knows the units, their prefixes and their conversions. This module adds currencies, Chinese, Japanese
and Korean names, and the notations of LaTeX.

Tested in tests/rewards/test_units.py.
"""

# ruff: noqa: RUF001  # unit signs and names of several scripts

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

LONGEST = 300  # maximum number of characters of a measured value

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_SPACES = re.compile(r"\\[,;:! ]|~|\\(?:quad|qquad|thinspace|enspace)(?![a-zA-Z])|[\u00a0\u2009\u202f\u3000]")
_WRAPPED = re.compile(
    r"\\(?:text|textrm|textnormal|textup|mathrm|mathit|mathsf|mbox|operatorname|unit|si|rm)\s?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_SIGNS = (
    (re.compile(r"\^?\s?\{?\s?\\circ\s?\}?|\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])|º"), "°"),
    (re.compile(r"\\mu(?![a-zA-Z])\s?|\\micro(?![a-zA-Z])\s?|\u03bc"), "µ"),
    (re.compile(r"\\(?:Omega|ohm)(?![a-zA-Z])|\u2126"), "Ω"),
    (re.compile(r"\\(?:AA|angstrom)(?![a-zA-Z])|\\mathring\{A\}|\u212b"), "Å"),
    (re.compile(r"\\cdot(?![a-zA-Z])|\\times(?![a-zA-Z])(?=\s*\x01)|[·⋅∙]"), "*"),
)
_POWERS = {"²": "^2", "³": "^3", "⁻": "^-", "¹": "1"}
_TABLE = yaml.safe_load(Path(__file__).with_name("units.yaml").read_text(encoding="utf-8"))
_CURRENCY_SIGNS: dict[str, str] = _TABLE["currency_signs"]
_NAMES: dict[str, str] = {name: unit for unit, names in _TABLE["names"].items() for name in names}
_KNOWN = frozenset(_TABLE["known"])
_PLAIN_LETTERS = frozenset("mgshVANJWKLCFTH")
"""Units of one letter that count without `\\text{}` around them, if a blank stands before them: "5 m"."""
_ANGLES = frozenset({"degree", "radian"})
_WORD = rf"(?:°[CF]?|[A-Za-zµΩÅ]{{1,20}}|[{_CJK}]{{1,7}})"
_POWER = r"(?:\s?(?:\^|\*\*)\s?\{?\s?([-−]?\d)\s?\}?|(?<=[a-z])([23])(?![\d.]))?"
_FACTOR = re.compile(rf"(?:(?P<square>square|sq\.?|平方)|(?P<cubic>cubic|cu\.?|立方))?\s?(?P<name>{_WORD}){_POWER}")
_SEPARATOR = re.compile(r"\s?(?:(?P<over>/|\bper\b|每)|\*|\.(?=[a-zA-Z])|(?=[\s\x01()A-Za-z°µΩÅ]))[\s\x01]*")
_TAIL = re.compile(rf"(?P<gap>\s*)(?P<wrapped>\x01?)(?P<unit>\s*(?:/\s?)?(?:°|[A-Za-zµΩÅ{_CJK}]).*)", re.DOTALL)
_NUMBER_END = re.compile(r"[\d)}\]!π]|\\pi(?![a-zA-Z])|\\infty(?![a-zA-Z])")
_NUMERIC = re.compile(
    r"(?:[A-Za-z](?:_\{?\w{1,8}\}?)?\s?=\s?)?(?:[-+−±\d.,/()\s^{}*!π]|\\(?:d?frac|tfrac|sqrt|pi|times|cdot|pm|left|right|approx)(?![a-zA-Z])|\\[,!])+"
)


@dataclass(frozen=True)
class Measured:
    """A value with a unit. `number` is the text before the unit. `unit` is an expression that pint understands."""

    number: str
    unit: str


@cache
def _registry() -> Any:
    import pint  # imported here because it takes a third of a second, and only worker processes need it

    registry = pint.UnitRegistry(autoconvert_offset_to_baseunit=True, cache_folder=None)
    for definition in _TABLE["definitions"]:
        registry.define(definition)
    return registry


def prepare() -> None:
    """Loads the library, so that this does not count against a sample's time limit."""
    _ = _registry()


@lru_cache(maxsize=1024)
def split(text: str) -> Measured | None:
    """Returns the number and the unit of a text, or None if the text does not end with a known unit. A currency sign
    before the number is a unit too."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    for sign, unit in _CURRENCY_SIGNS.items():
        if text.startswith(sign) and text[len(sign) :].lstrip()[:1] in tuple("0123456789.") and not text.endswith("$"):
            return Measured(text[len(sign) :].strip(), unit)
    plain = _simplified(text)
    for end in _NUMBER_END.finditer(plain):
        tail = _TAIL.fullmatch(plain, end.end())
        if tail is None:
            continue
        number, unit = plain[: end.end()].replace("\x01", "").replace("*", r"\cdot ").strip(), _expression(tail["unit"])
        certain = bool(tail["wrapped"]) or not unit or _certain(tail["unit"].strip(), bool(tail["gap"]))
        if unit and certain and (tail["wrapped"] or _NUMERIC.fullmatch(number)):
            return Measured(number, unit)
    return None


def without_counter(text: str) -> str:
    """Removes a Chinese, Japanese or Korean word after a number, such as a counter: "5个" becomes "5"."""
    match = (
        re.fullmatch(rf"(.*[\d)}}])\s?(?:\\text\{{)?\s?[{_CJK}]{{1,6}}\}}?[。.]?", text, re.DOTALL)
        if len(text) <= LONGEST
        else None
    )
    return match[1] if match else text


def comparable(true: str, given: str) -> bool:
    """True if values in the two units can be compared: they measure the same. Angles in degrees and in radians cannot
    be compared, because they would have to be converted."""
    units = _registry()
    ours, theirs = units.parse_units(true), units.parse_units(given)
    if ours == theirs:
        return True
    if _ANGLES & {*map(str, ours._units), *map(str, theirs._units)}:
        return False
    return bool(ours.dimensionality == theirs.dimensionality)


def converted(value: float, given: str, true: str) -> float:
    """Converts a value to the unit `true`. The two units must be comparable."""
    units = _registry()
    return float(units.Quantity(value, units.parse_units(given)).to(units.parse_units(true)).magnitude)


def same(true: str, given: str) -> bool:
    return bool(_registry().parse_units(true) == _registry().parse_units(given))


def _simplified(text: str) -> str:
    """Replaces LaTeX notations by plain signs. The character \\x01 stands before what was inside `\\text{...}`."""
    text = _SPACES.sub(" ", text)
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    for _ in range(3):
        text = _WRAPPED.sub(lambda match: f"\x01{match[1]}", text)
    for sign, power in _POWERS.items():
        text = text.replace(sign, power)
    text = re.sub(r"([µ°])\s?\x01\s?", "\x01\\1", text.replace("^-^", "^-"))
    return text.strip(" .")


def _certain(unit: str, gap: bool) -> bool:
    """True if a unit without `\\text{}` around it cannot be a variable. "5 m" is a length, "5m" and "5x" are not."""
    return len(unit) > 1 or not unit.isascii() or (gap and unit in _PLAIN_LETTERS)


@lru_cache(maxsize=1024)
def _expression(text: str) -> str | None:
    """Returns the unit as an expression for pint, or None if a part of the text is no known unit."""
    parts = list(_factors(text.replace("\x01", " ").strip()))
    if not parts or None in parts:
        return None
    expression = "*".join(f"({name})**{power}" for name, power in filter(None, parts))
    try:
        unit = _registry().parse_units(expression)
        known = all(_root(name) in _KNOWN for name in unit._units)
    except Exception:  # pint raises errors of many kinds for text that is no unit
        return None
    return expression if known else None


def _root(name: str) -> str:
    """Returns the name of a unit without its prefix: "kilometer" -> "meter"."""
    if name in _KNOWN:
        return name
    found = _registry().parse_unit_name(name)
    return found[0][1] if found else name


def _factors(text: str) -> Iterator[tuple[str, int] | None]:
    """Yields name and power of each factor of a unit; None if the text cannot be read."""
    position, sign = 0, 1
    if text.startswith("/"):
        position, sign = len(text) - len(text[1:].lstrip()), -1
    while position < len(text):
        if text[position] in "()":  # a product in brackets after "/": all of its factors are below the line
            sign = sign if text[position] == "(" else 1
            position += 1
            continue
        factor = _FACTOR.match(text, position)
        if factor is None:
            yield None
            return
        name, power = factor["name"], int((factor[4] or factor[5] or "1").replace("−", "-"))
        power = sign * (2 if factor["square"] else 3 if factor["cubic"] else power)
        if name[0] > "\u3000":
            yield from _han_factors(name, power)
        else:
            yield (_NAMES.get(name) or _NAMES.get(name.lower(), name)).replace("°", "degree"), power
        position = factor.end()
        if text[position:].strip(") "):
            separator = _SEPARATOR.match(text, position)
            if separator is None or separator.end() == len(text):
                yield None
                return
            sign = -1 if separator["over"] else sign
            position = separator.end()
        else:
            return


def _han_factors(name: str, power: int) -> Iterator[tuple[str, int] | None]:
    """Yields the factors of a Chinese, Japanese or Korean unit, such as "米每秒" or "平方米"."""
    for number, part in enumerate(name.split("每")):
        own = power if number == 0 else -power
        for prefix, exponent in (("平方", 2), ("立方", 3)):
            if part.startswith(prefix):
                part, own = part.removeprefix(prefix), own * exponent
        yield (_NAMES[part].replace("°", "degree"), own) if part in _NAMES else None
