"""Data rows that cannot be used: where each one stands, why, and the error that lists all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 20  # the most bad rows that an error message lists


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `line` counts from 1: a line of a JSONL file, a row of any other source."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class RowError(ValueError):
    """Some rows cannot be used. `bad` has all of them; the message has the first 20 and their number."""

    def __init__(self, bad: Sequence[BadRow]) -> None:
        self.bad = tuple(bad)
        super().__init__("\n".join([f"{len(bad)} bad data row(s):", *listing(bad)]))


class InvalidRow(Exception):
    """The reason why the row that is being read cannot be used. rows.py turns it into a BadRow."""


def listing(bad: Sequence[BadRow]) -> list[str]:
    """One line for each of the first 20 rows, then one with the number of the others."""
    more = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return [*(f"  {row}" for row in bad[:SHOWN]), *more]


def describe(value: Any) -> str:
    """The type of a value and the value, shortened, for an InvalidRow."""
    return "missing" if value is None else f"{type(value).__name__} {shorten(value)}"


def shorten(value: Any) -> str:
    """repr(value), cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
