"""Reads numbers written in words: English ("twenty-one", "one hundred and five") and Chinese or Japanese ("二十一",
"一百零五").

Tested in tests/rewards/test_count.py.
"""

import re
import unicodedata

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SMALL += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_UNITS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "dozen": 12}
_WORD = "|".join(sorted([*_UNITS, *_SCALES], key=len, reverse=True))
MOST = 10**15  # larger numbers are not read
_BEFORE_ONE = (
    r"(?<!which )(?<!any )(?<!the )(?<!this )(?<!that )(?<!each )(?<!every )(?<!another )(?<!other )(?<!no )(?<!not )"
)
ENGLISH = re.compile(
    rf"\b(?:(?:half )?an?\s{{1,3}}(?=hundred|thousand|million|dozen))?"
    rf"(?:(?!one)|{_BEFORE_ONE})(?:{_WORD})(?:(?:,?[\s-]{{1,3}}|\s{{1,3}}and\s{{1,3}})(?:{_WORD})){{0,20}}\b",
    re.I,
)
# 一 in words such as 一些, 一起 and 第一 is no number; 十几 is no certain number
HAN = re.compile(
    r"(?<![第统唯万])(?![一两](?:[些样起下般定共切直旦边面致半]))[零〇一二三四五六七八九十百千万萬两兩廿]{1,15}"
    r"(?![几多余零〇一二三四五六七八九十百千万萬两兩廿])"
)


def words(text: str) -> list[tuple[int, int, int]]:
    """Returns start, end and value of each number in words, in the order of the text."""
    found = [(match.span(), english(match[0])) for match in ENGLISH.finditer(text)]
    found += [(match.span(), han(match[0])) for match in HAN.finditer(text)]
    return sorted((start, end, value) for (start, end), value in found if value is not None)


def english(text: str) -> int | None:
    """Returns the number that English number words mean, or None if they are no single number, such as "two three"."""
    total, current, last = 0, 0, None
    for word in re.findall(_WORD, text.lower()):
        if word in _SCALES:
            scale = _SCALES[word]
            if max(current, 1) * scale > MOST or total > MOST:
                return None
            current = max(current, 1) * scale
            if scale >= 1000:
                total, current = total + current, 0
            last = None
            continue
        number = _UNITS[word]
        if last is not None and not (last >= 20 and last % 10 == 0 and 0 < number < 10):
            return None
        current, last = current + number, number
    return (total + current) // (2 if text.lower().startswith("half ") else 1)


def han(text: str) -> int | None:
    """Returns the number that Chinese numerals mean, or None. A series of digits, such as "二〇二一", is read as it
    stands."""
    values = [
        int(unicodedata.numeric(character, 2)) for character in text
    ]  # 两 and 兩, which mean 2, have no value in Unicode
    if max(values) < 10:
        # two digits without a zero, such as 两三, mean "two or three"
        return int("".join(map(str, values))) if len(values) != 2 or 0 in values else None
    total, section, digit = 0, 0, 0
    for value in values:
        if value < 10:
            digit = value
        elif value >= 10_000:
            total, section, digit = total + max(section + digit, 1) * value, 0, 0
        elif value == 20:
            section, digit = section + 20, 0
        else:
            section, digit = section + max(digit, 1) * value, 0
    if digit and len(values) > 1 and 100 <= values[-2] <= 10_000:  # 一百二 is short for 一百二十
        digit *= values[-2] // 10
    return total + section + digit
