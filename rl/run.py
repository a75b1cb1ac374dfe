"""Implements `python -m rl.run RECIPE [--profile cpu] [key=value ...]`, which checks a recipe and then starts the run.

A recipe describes one stage, or a chain of stages (rl/recipe/chain.py). Exit codes are in rl/exits.py.

Tested in tests/runs/test_run.py.
"""

import argparse
import sys
from collections.abc import Sequence, Set
from datetime import datetime
from pathlib import Path

from rl.exits import (
    DONE,
    INTERRUPTED,
    NO_GPU,
    InputError,
    add_stop_option,
    as_input_error,
    check_hardware,
    has_gpus,
    run_command,
)
from rl.recipe.chain import LINK, Chain, is_chain, load_chain
from rl.recipe.layers import find_recipe
from rl.recipe.resolve import Change, MissingOption, Resolved, describe, differences, load


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m rl.run", description="RL post-training: run a recipe, or resume a run.")
    p.add_argument("recipe", nargs="?", help="a shipped recipe's name, e.g. rlvr, or a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options of the recipe, e.g. ppo.policy_lr=1e-6")
    p.add_argument("--profile", help="scale of the run: a name in recipes/profiles (cpu), or a YAML file")
    p.add_argument("--output", type=Path, help="new run folder (default: runs/<recipe>-<time>)")
    p.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue a run from its newest checkpoint")
    p.add_argument("--allow", action="append", default=[], metavar="KEY", help="option that may change with --resume")
    p.add_argument("--stage", help="the stage to run; in a chain, the stage to begin with")
    p.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    p.add_argument("--verbose", action="store_true", help="show the logs of Ray and vLLM")
    add_stop_option(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_intermixed_args(arguments)
    outside = "interrupted before or after the training; nothing to save"
    return run_command(lambda: _main(args), interrupted=outside, stop_signal=args.stop_signal)


def _main(args: argparse.Namespace) -> int:
    if args.allow and not args.resume:
        raise InputError("--allow is for --resume: in a new run, every option may have any value")
    loaded = _resumed(args) if args.resume else _new(args)
    return _run_chain(loaded, args) if isinstance(loaded, Chain) else _run_stage(loaded, args)


def _new(args: argparse.Namespace) -> Resolved | Chain:
    """Returns the recipe of the command line, with the values of the profile and the overrides."""
    if args.recipe is None or "=" in args.recipe:
        raise InputError("name a recipe, e.g. python -m rl.run rlvr --profile cpu")
    recipe, layers = find_recipe(args.recipe), {"profile": args.profile, "overrides": args.overrides}
    try:
        if is_chain(recipe):
            return load_chain(recipe, _output(args).resolve(), first=args.stage, **layers)
        return load(recipe, stage=args.stage, **layers)
    except MissingOption as missing:
        if args.profile is None and not has_gpus():
            raise InputError(f"{NO_GPU.format(recipe=args.recipe)}\nIn addition: {missing}") from missing
        raise


def _saved_recipe(args: argparse.Namespace) -> Path:
    """Returns the recipe file of the run that is resumed. Raises InputError for arguments that --resume does not
    accept."""
    if args.profile or args.output or args.stage:
        raise InputError("--resume continues with the run's own recipe; leave out --profile, --output and --stage")
    if wrong := next((text for text in _overrides(args) if "=" not in text), None):
        raise InputError(f"--resume takes key=value overrides, not {wrong}")
    recipe = args.resume / "recipe.yaml"
    if not recipe.is_file():
        raise InputError(f"{args.resume} is no run folder: it has no recipe.yaml")
    return recipe


def _overrides(args: argparse.Namespace) -> list[str]:
    """Returns all positional arguments. With --resume, every positional argument is an override."""
    return [text for text in (args.recipe, *args.overrides) if text]


def _resumed(args: argparse.Namespace) -> Resolved | Chain:
    """Returns the saved recipe of the run, with the values of the overrides. Raises InputError for overrides that are
    not allowed."""
    recipe = _saved_recipe(args)
    if is_chain(recipe):
        return _resumed_chain(recipe, args)
    saved, wanted = load(recipe), load(recipe, overrides=_overrides(args))
    _check_changes(differences(saved.config, wanted.config), MAY_CHANGE, args.allow)
    return wanted


def _resumed_chain(recipe: Path, args: argparse.Namespace) -> Chain:
    """Returns the saved chain, with the values of the overrides. Raises InputError for overrides that are not allowed.

    The option `iterations` of a stage cannot change after the next stage has started.
    """
    from rl.record.run_folder import RunFolder

    folder = args.resume.resolve()
    saved = load_chain(recipe, folder, begun=True)
    wanted = load_chain(recipe, folder, overrides=_overrides(args), begun=True)
    changes, may_change = [], set()
    for before, step, following in zip(saved.steps, wanted.steps, [*wanted.steps[1:], None], strict=True):
        changes += [
            change._replace(key=f"{step.name}.{change.key}")
            for change in differences(before.resolved.config, step.resolved.config)
            if step.resolved.provenance.get(change.key) != LINK
        ]
        ended = following is not None and wanted.of(following).exists()
        may_change |= {f"{step.name}.{key}" for key in MAY_CHANGE - ({"iterations"} if ended else set())}
        done = max((line["iteration"] for line in RunFolder(wanted.of(step)).read_metrics()), default=0)
        if not step.curates and done > step.resolved.config.iterations:
            raise InputError(
                f"{step.name}.iterations = {step.resolved.config.iterations}, but {done} iterations are done already; "
                "the policy cannot go back to an earlier iteration"
            )
    _check_changes(changes, may_change, args.allow)
    return wanted


def _check_changes(changed: Sequence[Change], may_change: Set[str], allowed: Sequence[str]) -> None:
    """Raises InputError for options that may not change when a run is resumed."""
    if unchanged := set(allowed) - {change.key for change in changed}:
        raise InputError(f"--allow {sorted(unchanged)[0]}: the overrides do not change this option; leave out --allow")
    changes = [change for change in changed if change.key not in may_change | set(allowed)]
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        named = " ".join(f"--allow {change.key}" for change in changes)
        raise InputError(
            f"a resumed run keeps its recipe, but these options would change:{listed}\nStart a new run with the "
            f"changes, or allow the changes: {named}"
        )


MAY_CHANGE = frozenset(
    {
        "iterations",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.keep_every",
        "eval.every",
        "eval.sampled_rows",
        "rollout.save",
        "log.trackers",
        "log.timeline",
        "max_restarts",
        "max_start_s",
        "learner.patience_s",
        "rollout.patience_s",
    }
)  # options that do not affect the weights


def _run_chain(chain: Chain, args: argparse.Namespace) -> int:
    from stages import pipeline

    for step in chain.steps:
        check_hardware(step.resolved.config, dry_run=args.dry_run)
    with as_input_error():
        lines = pipeline.check(chain, offer_truths=args.dry_run)
    if args.dry_run:
        values = [f"--- {step.name}\n{describe(step.resolved)}" for step in chain.steps]
        print(*values, *lines, sep="\n")
        return DONE
    finished = pipeline.run(chain, new=args.resume is None, verbose=args.verbose)
    if not finished:
        print(f"interrupted; continue with: python -m rl.run --resume {chain.folder}")
    return DONE if finished else INTERRUPTED


def _run_stage(resolved: Resolved, args: argparse.Namespace) -> int:
    from rl.record.display import Display
    from rl.record.run_folder import RunFolder
    from stages.plan import make_plan

    check_hardware(resolved.config, dry_run=args.dry_run)
    with as_input_error():
        plan = make_plan(resolved.config, begun=args.resume is not None, offer_truths=args.dry_run)
    if args.dry_run:
        print(describe(resolved, lambda section: section != "curate"), *plan.lines(), sep="\n")
        return DONE
    from stages.train import train  # imports Ray

    with as_input_error():
        folder = RunFolder.resume(args.resume) if args.resume else RunFolder.create(_output(args), resolved.yaml())
    if args.resume:
        folder.write_recipe(resolved.yaml())
    with Display(resolved.config) as display:
        finished = train(plan, folder, display, recipe=resolved.plain(), verbose=args.verbose)
    return DONE if finished else INTERRUPTED


def _output(args: argparse.Namespace) -> Path:
    return args.output or Path("runs") / f"{Path(args.recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"


if __name__ == "__main__":
    sys.exit(main())
