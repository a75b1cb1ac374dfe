"""Compares two model folders, or the logprobs that the learner, vLLM and transformers compute from one folder.

    python -m rl.model.compare A B [ROWS.jsonl]    # are the tensors and the logprobs of two folders the same?
    python -m rl.model.compare A [ROWS.jsonl]      # do learner, vLLM and transformers agree on a folder?

ROWS are data rows whose prompts, with their pictures, are used. Without rows, random tokens and pictures are used. Exit
code 2 means that names or shapes of tensors differ, or that the mean difference of the logprobs is over --limit.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rl.exits import DONE, WRONG_INPUT, InputError, run_command
from rl.model import hf_folder
from rollout.comparison import (
    LogprobDifference,
    Setting,
    TensorDifferences,
    compare_tensors,
    difference,
    logprobs,
    programs_for,
    questions,
)

SHOWN = 8  # maximum number of names in a line


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m rl.model.compare", description="Compare model folders.")
    p.add_argument("a", metavar="A", help="a model folder or hub id")
    p.add_argument("more", nargs="*", metavar="B, ROWS", help="another model folder, and a file with data rows")
    p.add_argument("--limit", type=float, default=1e-3, help="maximum mean difference of logprobs in nats per token "
                   "(default: 0.001; in bfloat16, 0.05 is usual)")  # fmt: skip
    p.add_argument("--rows", type=int, default=16, metavar="N", help="number of data rows that are used (default: 16)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_args(arguments)
    return run_command(lambda: _main(args), input_errors=(ValueError, OSError), failures=(RuntimeError,))


def _main(args: argparse.Namespace) -> int:
    folders = [hf_folder.local_folder(one) for one in (args.a, *args.more) if not Path(one).is_file()]
    files = [one for one in args.more if Path(one).is_file()]
    if len(folders) > 2 or len(files) > 1:
        raise InputError("give one or two model folders, and at most one file with data rows")
    setting, console = Setting(args.device, args.dtype), Console(width=None if sys.stdout.isatty() else 120)
    asked = questions(folders[0], files[0] if files else None, args.rows)
    if len(folders) == 2:
        tensors = compare_tensors(*folders)
        for line in _tensor_lines(tensors):
            console.print(line, highlight=False, markup=False)
        if not tensors.fit:
            return WRONG_INPUT
        named = [(str(folder), logprobs("learner", folder, asked, setting)) for folder in folders]
    else:
        named = [(program, logprobs(program, folders[0], asked, setting)) for program in programs_for(folders[0])]
    found = [difference(one, two, asked) for one, two in combinations(named, 2)]
    console.print(_table(found, args.limit))
    return DONE if all(one.mean <= args.limit for one in found) else WRONG_INPUT


def _tensor_lines(found: TensorDifferences) -> Iterator[str]:
    yield f"{found.common} tensors have the same names in A and B"
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        if names:
            yield f"{len(names)} {title}: {_first(names)}"
    for title, differing in (("shape", found.shapes), ("dtype", found.dtypes)):
        if differing:
            named = [f"{name} ({a} in A, {b} in B)" for name, a, b in differing]
            yield f"{len(differing)} differ in {title}: {_first(named)}"
    if found.values:
        largest = sorted(found.values, key=lambda name: -found.values[name])
        yield f"{len(largest)} differ in values, most: {_first([f'{n} by {found.values[n]:.2g}' for n in largest])}"
    elif found.common:
        yield "all values are equal"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _table(found: Sequence[LogprobDifference], limit: float) -> Table:
    table = Table(title=f"Difference of logprobs in nats per token (limit of the mean: {limit:g})")
    for name in ("first", "second", "tokens", "mean", "largest", "largest on", ""):
        table.add_column(name, justify="right" if name in ("tokens", "mean", "largest") else "left")
    for one in found:
        verdict = "agree" if one.mean <= limit else "DIFFER"
        table.add_row(
            one.first, one.second, str(one.tokens), f"{one.mean:.2g}", f"{one.largest:.2g}", one.question, verdict
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
