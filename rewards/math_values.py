"""Compares values that the library Math-Verify has parsed, and estimates how long an evaluation takes.

Tested in tests/rewards/test_math_verify.py.
"""

import math
from collections.abc import Sequence
from typing import Any

MOST_DIGITS = 30_000  # maximum number of digits of any number during the evaluation
MOST_TERMS = 300  # maximum number of terms of a power that is expanded
MOST_ADDENDS = 10_000  # maximum number of terms of a sum or product over a range

DECIMALS = 50  # two exact forms are compared with this number of significant digits
NOISE = 1e-12  # relative difference of two decimals that is put down to binary floating point


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


def numbers_equal(true: Any, given: Any, significant: int) -> bool | None:
    """Compares two numbers that sympy has parsed. Returns None if one of them is no number.

    Two exact numbers are equal if they are the same. A decimal is equal to a number that has the same value, and, if
    the decimal has at least `significant` significant digits, to every number that it is the rounding of. Call `digits`
    for both numbers first.
    """
    if not (_is_number(true) and _is_number(given)):
        return None
    true, given = _evaluated(true), _evaluated(given)
    if true.is_finite is not True or given.is_finite is not True:  # infinite, or no number at all such as 0/0
        return bool(true == given and true.is_infinite)
    decimals = [_decimal(one) for one in (true, given)]
    if true == given:
        return True
    if decimals == [None, None] and getattr(true, "is_Rational", False) and getattr(given, "is_Rational", False):
        return False
    a, b = true.evalf(DECIMALS), given.evalf(DECIMALS)
    size, apart = abs(_mpf(a)), abs(_mpf(a - b))
    if decimals == [None, None]:
        return bool(apart <= size * 10 ** (2 - DECIMALS))
    if apart <= size * NOISE:
        return True
    for decimal, other in ((decimals[0], b), (decimals[1], a)):
        if decimal is not None and decimal >= significant and other.is_real:
            rounded = _rounded(other, decimal)
            if abs(rounded - _mpf(a if other is b else b)) <= size * NOISE:
                return True
    return False


def containers_equal(true: Any, given: Any, significant: int) -> bool:
    """True if two tuples, sets, intervals or matrices have the same form and equal numbers."""
    ours, theirs = _items(true), _items(given)
    if ours is None or theirs is None or ours[0] != theirs[0] or len(ours[1]) != len(theirs[1]):
        return False
    return all(numbers_equal(a, b, significant) for a, b in zip(ours[1], theirs[1], strict=True))


def exact(expression: Any) -> Any:
    """Replaces the decimals in an expression by fractions, so that the library compares them exactly."""
    from sympy import Basic, Float, MatrixBase, Rational

    if isinstance(expression, MatrixBase):
        return expression.applyfunc(exact)
    if not isinstance(expression, Basic) or not expression.has(Float):
        return expression
    # repr gives the shortest text with the same value: the decimal that was written
    return expression.xreplace({one: Rational(repr(float(one))) for one in expression.atoms(Float) if one.is_finite})


def as_float(expression: Any) -> float | None:
    """Returns the value of a real number as a float, or None if the expression is no real number."""
    if not _is_number(expression):
        return None
    value = _evaluated(expression).evalf(20)
    return float(value) if value.is_real and value.is_finite else None


def _is_number(expression: Any) -> bool:
    from sympy import Expr, MatrixBase

    return (
        isinstance(expression, Expr)
        and not isinstance(expression, MatrixBase)
        and bool(expression.is_number)
        and not expression.free_symbols
        and getattr(expression, "is_finite", None) is not False
    )


def _evaluated(expression: Any) -> Any:
    try:
        return expression.doit()
    except Exception:  # sympy raises errors of many kinds for expressions without a value
        return expression


def _decimal(number: Any) -> int | None:
    """Returns the number of significant digits of a decimal, such as 3 for 0.0120 and for 1.20e-9. Zeros at the end are
    not counted, because sympy does not keep them. Returns None for an exact number."""
    from sympy import Float

    if not number.has(Float):
        return None
    value = number.evalf(17)
    if not (value.is_real and value.is_finite):
        return 0
    text = repr(float(f"{float(value):.15g}"))
    return len(text.partition("e")[0].replace(".", "").replace("-", "").strip("0")) or 1


def _mpf(number: Any) -> Any:
    """Converts a sympy number, real or complex, to mpmath, which has no smallest number."""
    import mpmath

    real, imaginary = number.as_real_imag()
    return mpmath.mpc(mpmath.mpmathify(real), mpmath.mpmathify(imaginary)) if imaginary != 0 else mpmath.mpmathify(real)


def _rounded(number: Any, significant: int) -> Any:
    import mpmath

    return mpmath.mpmathify(mpmath.nstr(_mpf(number), significant, strip_zeros=False))


def _items(value: Any) -> tuple[str, Sequence[Any]] | None:
    """Returns a name for the form of a container and its numbers in a fixed order; None for any other value."""
    from sympy import FiniteSet, Interval, MatrixBase, Tuple

    if isinstance(value, MatrixBase):
        return f"matrix {value.shape}", list(value.flat())
    if isinstance(value, Interval):
        return f"interval {value.left_open} {value.right_open}", [value.start, value.end]
    if isinstance(value, Tuple):
        return "tuple", list(value)
    if isinstance(value, FiniteSet) and len(value) <= MOST_TERMS and all(map(_is_number, value)):
        return "set", sorted(value, key=_order)
    return None


def _order(number: Any) -> tuple[float, float]:
    value = complex(number)
    return (value.real, value.imag)
