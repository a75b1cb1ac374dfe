"""Keeps the data rows that are worth training on: `python -m stages.curate RECIPE --out DIR [key=value ...]`.

    DIR/recipe.yaml            the resolved recipe
        rows/00000.jsonl       kept rows in the training format, with pools; meta.curation has the results of filters
        fates/00000.jsonl      the decision about each row of the block: kept or dropped
        answers/00000-difficulty.jsonl   every answer of a model, in the order of arrival
        rows/pictures/         the pictures of the kept rows
        report.txt, report.html

The rows are processed in blocks, and 00000 is the number of a block. stages/curation/run.py does the work. rl/exits.py
defines the exit codes.

Tested in tests/runs/test_curate_run.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rl.exits import DONE, add_stop_option, check_hardware, run_command
from rl.recipe.layers import find_recipe
from rl.recipe.resolve import describe, load
from stages.curation.run import SECTIONS, checked


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m stages.curate", description="Keep the rows that are worth training on.")
    p.add_argument("recipe", help="a shipped recipe's name, e.g. curate, or a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. curate.difficulty.rollouts=8")
    p.add_argument("--out", type=Path, required=True, help="output folder; an unfinished curation in it is continued")
    p.add_argument("--profile", help="scale to run at: a name in recipes/profiles (cpu), or a YAML file")
    p.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    p.add_argument("--verbose", action="store_true", help="show what Ray and vLLM log")
    add_stop_option(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_intermixed_args(arguments)
    resume = f"The same command continues from the results in {args.out}"
    return run_command(lambda: _main(args), resume=resume, stop_signal=args.stop_signal)


def _main(args: argparse.Namespace) -> int:
    resolved = load(find_recipe(args.recipe), profile=args.profile, overrides=args.overrides)
    check_hardware(resolved.config, dry_run=args.dry_run)
    curation = checked(resolved.config, offer_truths=args.dry_run)
    if args.dry_run:
        print(describe(resolved, SECTIONS.__contains__), *curation.lines(), sep="\n")
        return DONE
    curation.run(args.out, resolved.yaml(), verbose=args.verbose)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
