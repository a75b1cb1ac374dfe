"""Measures a policy on held-out rows: pass@1, pass@K, majority vote and PaCoRe, with token counts and confidence
intervals.

    python -m rl.evaluate --model DIR --data FILE [--recipe RECIPE] [--modes sere,majority,pacore] [--json]

The recipe's options `rewards` and `accept` say how responses are scored and which responses count as right. With
--cache, the responses of the model are stored in a file. A later call with the same file reads these responses and does
not sample them again. Exit codes are in rl/exits.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError

from rl.config import Config
from rl.exits import DONE, InputError, add_stop_option, run_command
from rl.recipe.layers import find_recipe
from rl.recipe.resolve import load
from rollout.pacore.target import add_target_options, target_of
from stages.evaluation.measure import MODES, Questions, measure


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m rl.evaluate", description="Measure a policy on held-out rows.")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options of the recipe, e.g. accept.least=0.5")
    p.add_argument(
        "--model", required=True, help="Hugging Face folder or hub id; with --url the model's name on that server"
    )
    p.add_argument("--data", help="rows with ground truth, in any form of data.eval; default: data.eval of the recipe")
    p.add_argument(
        "--recipe",
        default="rlvr",
        help="recipe with the options rewards and accept: a shipped recipe's name (default: rlvr) or a YAML file",
    )
    p.add_argument("--profile", help="scale of the run, as in rl.run: a name in recipes/profiles (cpu), or a YAML file")
    p.add_argument("--modes", default=",".join(MODES), help="one or several of sere,majority,pacore (default: all)")
    p.add_argument("--attempts", type=int, default=16, metavar="K", help="chains of thought per row (default: 16)")
    p.add_argument("--syntheses", type=int, default=1, metavar="N", help="PaCoRe syntheses per row (default: 1)")
    p.add_argument("--limit", type=int, help="only the first LIMIT rows of each task are used (default: all)")
    p.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    p.add_argument("--cache", type=Path, help="JSONL that stores the model's responses; an existing file is read first")
    p.add_argument("--trajectories", type=Path, metavar="FILE", help="cache of another evaluation, or output of "
                   "rollout.generate; the first round is read from FILE and is not sampled again")  # fmt: skip
    p.add_argument("--blind", action="store_true", help="use only rows with pictures, and give each row the pictures "
                   "of another row; this measures the reward of answers that ignore the pictures")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_target_options(p)
    add_stop_option(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_intermixed_args(arguments)
    return run_command(
        lambda: _main(args),
        input_errors=(ValueError, FileNotFoundError),
        failures=(RuntimeError, OSError, TemplateError),
        stop_signal=args.stop_signal,
        resume=f"The same command continues from the responses in {args.cache}" if args.cache else "",
    )


def _main(args: argparse.Namespace) -> int:
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise InputError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: it has to be at least 1")
    if args.attempts < 1 or args.syntheses < 1:
        raise InputError(f"--attempts {args.attempts}, --syntheses {args.syntheses}: both have to be at least 1")
    questions = Questions(
        modes, args.attempts, args.syntheses, args.limit, args.seed, args.cache, args.trajectories, blind=args.blind
    )
    report = measure(config_of(args), target_of(args), questions)
    print(json.dumps(report.json(), indent=2)) if args.json else report.show()
    return DONE


def config_of(args: argparse.Namespace) -> Config:
    """Returns the config of the recipe, with the model and rows from the command line. Raises RecipeError if the
    recipe cannot be used."""
    rows = [f"data.train={args.data}", f"data.eval={args.data}"] if args.data else []
    # These overrides also set mandatory options, because the recipe may have no values for them.
    overrides = [f"model.path={args.model}", *args.overrides, *rows]
    return load(find_recipe(args.recipe), profile=args.profile, overrides=overrides).config


if __name__ == "__main__":
    sys.exit(main())
