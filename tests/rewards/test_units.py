"""Tests that a value is split into number and unit, and that units are compared."""

import pytest

from rewards import units


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("5 cm", "5", "cm"),
        ("5cm", "5", "cm"),
        ("5 m", "5", "m"),
        (r"5\,\mathrm{cm}", "5", "cm"),
        (r"9.8 \text{ m/s}^2", "9.8", "m/s**2"),
        ("9.8 m/s^2", "9.8", "m/s**2"),
        ("9.8 m/s²", "9.8", "m/s**2"),
        (r"8.3\,\mathrm{J\,mol^{-1}\,K^{-1}}", "8.3", "J/mol/K"),
        (r"8.3 \text{ J/(mol·K)}", "8.3", "J/mol/K"),
        (r"12\ \Omega", "12", "ohm"),
        (r"5 \, \mu\text{F}", "5", "microfarad"),
        (r"25^\circ\text{C}", "25", "degC"),
        (r"60^{\circ}", "60", "degree"),
        ("100 miles per hour", "100", "mile/hour"),
        ("40 square feet", "40", "foot**2"),
        (r"1.6 \times 10^{-19} \text{ C}", r"1.6 \times 10^{-19}", "C"),
        (r"x = 5\text{ cm}", "x = 5", "cm"),
        ("5厘米", "5", "cm"),
        ("3平方米", "3", "m**2"),
        ("10米每秒", "10", "m/s"),
        (r"20\text{元}", "20", "yuan"),
        (r"\$18.50", "18.50", "dollar"),
        ("$18", "18", "dollar"),
    ],
)
def test_a_measured_value_is_split_into_number_and_unit(text: str, number: str, unit: str) -> None:
    found = units.split(text)
    assert found and found.number == number
    assert units.same(unit, found.unit)


@pytest.mark.parametrize(
    "text", ["5", "2x", "5m", "3 m + 2", "2 a", "5 apples", "7 points", "x", "", "5 nonsense", "$x$", "15%"]
)
def test_variables_and_words_are_no_units(text: str) -> None:
    assert units.split(text) is None


@pytest.mark.parametrize(
    ("text", "rest"), [("5个", "5"), (r"5\text{个}", "5"), ("3匹", "3"), ("x个", "x个"), ("5", "5")]
)
def test_a_counter_after_a_number_is_removed(text: str, rest: str) -> None:
    assert units.without_counter(text) == rest


def test_units_that_measure_the_same_are_comparable_but_degrees_and_radians_are_not() -> None:
    assert units.comparable("m", "cm") and units.comparable("newton", "kg*m/s**2")
    assert not units.comparable("m", "s")
    assert not units.comparable("degree", "radian")
    assert not units.comparable("dollar", "yuan")


def test_values_are_converted_also_between_scales_of_temperature() -> None:
    assert units.converted(5, "m", "cm") == pytest.approx(500)
    assert units.converted(100, "degC", "degF") == pytest.approx(212)


def test_a_long_text_has_no_unit() -> None:
    assert units.split("5 " + "m " * 100_000) is None
