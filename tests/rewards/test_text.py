"""Tests that text is normalised before it is compared."""

from rewards.text import normalised


def test_normalising_removes_case_extra_blanks_a_final_period_and_invisible_characters() -> None:
    assert normalised(" The  Blue\nHouse. ") == normalised("the\u200f blue house") == "the blue house"
    assert normalised(r"\text{Blue}") == "blue"
