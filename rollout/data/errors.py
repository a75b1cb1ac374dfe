"""Defines the errors for data rows that cannot be used. Each such row is reported with its file, line and reason."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 20  # maximum number of bad rows in an error message


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. In a JSONL file, `line` is the number of the line. In any other source, it is the
    number of the row. Both are counted from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class RowError(ValueError):
    """The error for rows that cannot be used. `bad` has all bad rows. The error message lists the first 20 of them and
    gives the total number."""

    def __init__(self, bad: Sequence[BadRow]) -> None:
        self.bad = tuple(bad)
        super().__init__("\n".join([f"{len(bad)} bad data row(s):", *listing(bad)]))


class InvalidRow(Exception):
    """The error for a single row that cannot be used. The error message is the reason. rows.py converts this error into
    a BadRow."""


def listing(bad: Sequence[BadRow]) -> list[str]:
    """Returns one line for each of the first 20 rows, then one line with the number of the other rows."""
    more = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return [*(f"  {row}" for row in bad[:SHOWN]), *more]


def describe(value: Any) -> str:
    """Returns a text with the type of a value and the shortened value, for the message of an InvalidRow."""
    return "missing" if value is None else f"{type(value).__name__} {shorten(value)}"


def shorten(value: Any) -> str:
    """Returns repr(value), shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
