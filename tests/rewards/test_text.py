"""Tests that answers are found in a text and normalised."""

import pytest

from rewards.answer import last_boxed
from rewards.text import normalised


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a} } {", "a"),
        (r"{ \boxed {a}", "a"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("no box", None),
    ],
)
def test_the_last_box_that_closes_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


def test_normalising_removes_case_extra_blanks_a_final_period_and_invisible_characters() -> None:
    assert normalised(" The  Blue\nHouse. ") == normalised("the\u200f blue house") == "the blue house"
    assert normalised(r"\text{Blue}") == "blue"
