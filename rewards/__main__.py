"""Tools for authors of rewards: `python -m rewards list`, `python -m rewards try TARGET SAMPLES.jsonl`, and `python -m
rewards try --cases CASES.jsonl`.

`try` scores samples as a run would, in processes that can be killed. It prints the score, the details and the time of
each sample. If the reward compares responses with ground truths, `try` also scores each ground truth as a response, and
checks that this response gets the highest value. If samples have the column `expected`, a number or [lowest, highest],
`try` lists the samples whose score differs. `--compare` does the same with the scores that a run has recorded. With
`--cases`, each row names its reward in the columns `reward` and `params`.

The exit code is 0 for success. It is 2 for wrong input, if a ground truth does not get the highest value, and if a
score differs. It is 1 for any other error, such as an endpoint that does not answer. Tested in
tests/runs/test_reward_guide.py."""

import argparse
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import yaml

from rewards import registry
from rewards.endpoint import EndpointSpec, is_endpoint_name
from rewards.registry import all_rewards, get
from rewards.running.runner import Outage, RewardRunner
from rl.config import PenaltySpec, RewardSpec, ScorerSpec
from rl.exits import DONE, WRONG_INPUT, run_command
from rl.recipe.layers import find_recipe, shipped_recipes
from rl.types import Prompt, Resize, Rollout, Scored

if TYPE_CHECKING:
    from rollout.data.rows import Sample

TRIED = "tried"  # in `try`, all samples have this task, and a row judge has this name
SHOWN = 10  # maximum number of failing ground truths that are printed
TOLERANCE = 1e-6  # scores that differ by less are equal
MOST_WAIT_S = 60.0  # maximum wait for an endpoint that does not answer; shorter than in a run, because a person waits


@dataclass(frozen=True)
class Target:
    """The scorers that `try` runs: the rewards of one task, or one row judge."""

    specs: Sequence[RewardSpec]
    endpoints: Mapping[str, EndpointSpec]
    task: str | None = None  # the task's name in a recipe
    row_judge: ScorerSpec | None = None
    picture_folders: Sequence[str] = ()  # folders in which the samples' pictures may be

    @property
    def verifiable(self) -> dict[str, RewardSpec]:
        """The rewards that compare responses with ground truths. Each gets a task of its own: "0", "1", ..."""
        verifiable = [spec for spec in self.specs if get(spec.use, spec.params).reward.truth_as_text]
        return {str(number): spec for number, spec in enumerate(verifiable)}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m rewards", description="List rewards, and try one on samples.")
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list every reward, penalty and row judge with its parameters")
    trial = commands.add_parser("try", help="score samples with a reward")
    trial.add_argument("target", nargs="?", help="registered name, pkg.module:Name, file.py:Name, or RECIPE:task")
    trial.add_argument(
        "samples", nargs="?", help="JSONL of data rows with a `response`, such as a run's rollouts/000001.jsonl.gz; a "
        "column `expected` (a number, or [lowest, highest]) is compared with the score",
    )  # fmt: skip
    trial.add_argument(
        "--cases", metavar="FILE", help="in place of TARGET and samples: JSONL of samples that have `reward`, `params` "
        "and `expected`; lists the samples whose score differs",
    )  # fmt: skip
    trial.add_argument(
        "--compare", action="store_true", help="list the samples whose score differs from the one that the run recorded"
    )
    trial.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the reward")
    trial.add_argument(
        "--picture-folder", action="append", default=[], metavar="DIR",
        help="one more folder in which pictures of the samples may be; the data folders of TARGET's recipe, and of the "
        "run whose rollouts are scored, are known",
    )  # fmt: skip
    trial.add_argument("--model", metavar="FOLDER", help="the model's folder, for rewards with `coordinates: shown`")
    trial.add_argument("--json", action="store_true", help="print one JSON object per sample")
    trial.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="number of scoring processes")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = parser().parse_args(arguments)
    command = _list if args.command == "list" else partial(_try, args)
    return run_command(command, input_errors=(ValueError, OSError))


# list


def _list() -> int:
    for reward in all_rewards():
        kind = " (sees the group)" if reward.group else "" if reward.kind == "reward" else f" ({reward.kind})"
        print(f"{reward.name}{kind}: {_first_line(reward)}")
        for parameter in reward.parameters.values():
            print(f"    {_parameter(parameter, reward.annotation(parameter))}")
    return DONE


def _first_line(reward: registry.Reward) -> str:
    lines = (inspect.getdoc(reward.target) or "no docstring").splitlines()
    return lines[0].strip()


def _parameter(parameter: inspect.Parameter, annotation: Any) -> str:
    shown = "any" if annotation is parameter.empty else _type(annotation)
    needed = parameter.default is parameter.empty
    return f"{parameter.name}: {shown}" + ("  (required)" if needed else f"  (default {parameter.default!r})")


def _type(annotation: Any) -> str:
    """Describes a type for the author of a recipe: `float > 0`, `'all' | 'majority'`, `name of an endpoint`."""
    inner = get_args(annotation)
    match get_origin(annotation):
        case typing.Annotated if is_endpoint_name(annotation):
            return "name of an endpoint"
        case typing.Annotated:
            bounds = [m for mark in inner[1:] for m in getattr(mark, "metadata", [mark])]
            return " ".join([_type(inner[0]), *(text for bound in bounds for text in _bounds(bound))])
        case typing.Literal:
            return " | ".join(map(repr, inner))
        case typing.Union | types.UnionType:
            return " | ".join(map(_type, inner))
        case None:
            return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
        case origin:
            return f"{origin.__name__}[{', '.join(_type(one) for one in inner if one is not ...)}]"


def _bounds(mark: Any) -> Iterator[str]:
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if (limit := getattr(mark, name, None)) is not None:
            yield f"{sign} {limit:g}"


# try


def _try(args: argparse.Namespace) -> int:
    if args.cases:
        if args.target or args.samples or args.param or args.compare:
            raise ValueError("--cases FILE replaces TARGET, SAMPLES, --param and --compare; leave them out")
        return _try_cases(args)
    if not args.target or not args.samples:
        raise ValueError("give TARGET and SAMPLES, or --cases FILE")
    from rollout.data.rows import read_samples

    target = _target(args.target, args.param, args.samples)
    run_recipe = Path(args.samples).absolute().parent.parent / "recipe.yaml"  # if the samples are rollouts of a run
    of_run = _data_folders(run_recipe) if run_recipe.is_file() else []
    folders = (*target.picture_folders, *of_run, *args.picture_folder)
    samples = _of_task(read_samples(args.samples, folders, _shown(args.model)), target.task)
    wanted = [_recorded(one) if args.compare else _expected(one) for one in samples]
    if args.compare and not any(wanted):
        raise ValueError(f"{args.samples} has no recorded scores (column `reward`); --compare needs rollouts of a run")
    with _runner(target, args.workers) as runner:
        scored = _score(runner, target, samples)
        rollouts = [one.rollout for one in samples]
        for line in _as_lines(rollouts, scored) if args.json else _as_table(rollouts, scored):
            print(line)
        truths = _check_truths(runner, target, [one.prompt for one in rollouts])
    differing = _report_differences([*_differences(samples, scored, wanted)], sum(one is not None for one in wanted))
    return WRONG_INPUT if truths != DONE or differing else DONE


def _shown(model: str | None) -> Resize | None:
    if model is None:
        return None
    from rl.model import hf_folder

    return hf_folder.shown_size(model)


def _score(runner: RewardRunner, target: Target, samples: "Sequence[Sample]") -> list[Scored]:
    renamed = [replace(one.rollout, prompt=replace(one.rollout.prompt, task=TRIED)) for one in samples]
    return _score_rows(runner, renamed) if target.row_judge else runner.score(renamed)


def _try_cases(args: argparse.Namespace) -> int:
    """Scores the samples of `--cases`, each with its own reward, and prints those whose score differs."""
    from rollout.data.rows import read_samples

    groups: dict[str, list[Sample]] = {}
    for sample in read_samples(args.cases, args.picture_folder, _shown(args.model)):
        params = sample.row.get("params") or {}
        if not isinstance(sample.row.get("reward"), str) or not isinstance(params, Mapping):
            raise ValueError(
                f"{sample.place}: a case needs `reward`, the name of a reward, and may have `params`, an object"
            )
        if _expected(sample) is None:
            raise ValueError(f"{sample.place}: a case needs `expected`, a number or [lowest, highest]")
        groups.setdefault(json.dumps([sample.row["reward"], params], sort_keys=True), []).append(sample)
    differing: list[str] = []
    for key, samples in groups.items():
        name, params = json.loads(key)
        target = _named_target(name, params)
        with _runner(target, args.workers) as runner:
            scored = _score(runner, target, samples)
        lines = [*_differences(samples, scored, [_expected(one) for one in samples])]
        shown = f" {json.dumps(params)}" if params else ""
        print(f"{name}{shown}: {len(samples) - len(lines)} of {len(samples)} as expected")
        differing += lines
    return WRONG_INPUT if _report_differences(differing, sum(map(len, groups.values()))) else DONE


Wanted = tuple[float, float] | str
"""The lowest and the highest allowed score, or the word "invalid"."""


def _expected(sample: "Sample") -> Wanted | None:
    """Returns what the column `expected` of a sample allows, or None if there is no such column. Raises ValueError for
    a column that cannot be read."""
    value = sample.row.get("expected")
    if value is None or value == "invalid":
        return value
    bounds = value if isinstance(value, list) else [value, value]
    numbers = [one for one in bounds if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(bounds) != 2 or len(numbers) != 2 or not numbers[0] <= numbers[1]:
        raise ValueError(f'{sample.place}: expected is {value!r}; it must be a number, [lowest, highest] or "invalid"')
    return float(numbers[0]), float(numbers[1])


def _recorded(sample: "Sample") -> Wanted | None:
    """Returns the score that a run has recorded with a sample, or None if there is none."""
    if sample.row.get("invalid") is not None:
        return "invalid"
    value = sample.row.get("reward")
    return (float(value), float(value)) if isinstance(value, int | float) else None


def _differences(
    samples: "Sequence[Sample]", scored: Sequence[Scored], wanted: Sequence[Wanted | None]
) -> Iterator[str]:
    """Yields one line for each sample whose score is not as wanted."""
    for sample, one, want in zip(samples, scored, wanted, strict=True):
        if want is None:
            continue
        found = "invalid" if one.invalid is not None else f"{one.reward:.4g}"
        if isinstance(want, str):
            agrees, shown = found == want, want
        else:
            agrees = one.invalid is None and want[0] - TOLERANCE <= one.reward <= want[1] + TOLERANCE
            shown = f"{want[0]:.4g}" if want[0] == want[1] else f"{want[0]:.4g} to {want[1]:.4g}"
        if not agrees:
            rollout = sample.rollout
            truth = json.dumps(rollout.prompt.ground_truth, ensure_ascii=False)[:60]
            why = f" ({one.invalid})" if one.invalid else ""
            text = json.dumps(rollout.text[-80:], ensure_ascii=False)
            yield f"  {rollout.prompt.id}: {found}, not {shown}{why}; ground truth {truth}, response {text}"


def _report_differences(lines: Sequence[str], compared: int) -> bool:
    """Prints the samples whose score differs, and their share. Returns True if there are any."""
    if lines:
        print(
            f"{len(lines)} of {compared} scores differ ({len(lines) / compared:.1%}):",
            *lines,
            sep="\n",
            file=sys.stderr,
        )
    elif compared:
        print(f"all {compared} scores are as expected", file=sys.stderr)
    return bool(lines)


def _target(target: str, params: Sequence[str], samples: str) -> Target:
    file, _, task = target.rpartition(":")
    if file.endswith((".yaml", ".yml")) or file in shipped_recipes():
        if params:
            raise ValueError(f"{target} has its parameters in the recipe; leave out --param")
        return _of_recipe(file, task, samples)
    return _named_target(target, dict(_assignment(text) for text in params))


def _named_target(target: str, values: Mapping[str, Any]) -> Target:
    values = dict(values)
    kind = get(target, values).reward.kind
    if kind == "row judge":
        return Target((), {}, row_judge=ScorerSpec(use=target, params=values))
    if kind == "penalty":  # the reward is always 1, and the penalty lowers it
        return Target([RewardSpec(use="constant", penalties=(PenaltySpec(use=target, params=values),))], {})
    return Target([RewardSpec(use=target, params=values)], {})


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--param {text!r} is not NAME=VALUE")
    return name, yaml.safe_load(value)


def _of_recipe(file: str, task: str, samples: str) -> Target:
    from rl.recipe.resolve import load
    from stages.curation.judges import row_judges

    own = find_recipe(file)
    config = load(own, overrides=[f"data.train={json.dumps(os.path.abspath(samples))}"]).config
    endpoints = {name: EndpointSpec.of(name, one) for name, one in config.endpoints.items()}
    judges, folders = row_judges(config), _data_folders(own)
    if task in judges:
        return Target((), endpoints, row_judge=judges[task], picture_folders=folders)
    if task not in config.rewards:
        known = f"its tasks are {', '.join(config.rewards)}; its row judges are {', '.join(judges) or 'none'}"
        raise ValueError(f"{file} has no rewards.{task}; {known}")
    return Target(config.rewards[task], endpoints, task, picture_folders=folders)


def _data_folders(recipe: Path) -> list[str]:
    """Returns the folders of a recipe's data and pictures. The rollouts of a run name pictures in these folders."""
    from rl.recipe.errors import MissingOption
    from rl.recipe.resolve import load

    try:
        data = load(recipe).config.data
    except MissingOption:  # the recipe leaves it to the user to name the data
        return []
    files = [Path(source.path) for source in (*data.train, *data.eval)]
    return [*data.picture_folders, *(str(file if file.is_dir() else file.parent) for file in files if file.exists())]


def _of_task(samples: "list[Sample]", task: str | None) -> "list[Sample]":
    """Returns the samples of the recipe's task, or all samples if no sample has this task."""
    matching = [one for one in samples if one.rollout.prompt.task == task]
    if matching and len(matching) < len(samples):
        print(f"{len(samples) - len(matching)} samples of other tasks are left out", file=sys.stderr)
    return matching or samples


def _runner(target: Target, workers: int) -> RewardRunner:
    """Returns a runner. It has the tasks of `target.verifiable`, and one more task, TRIED. The task TRIED has all
    rewards of the target."""
    alone = {name: [one.model_copy(update={"penalties": (), "weight": 1.0})] for name, one in target.verifiable.items()}
    tasks: dict[str, Sequence[RewardSpec]] = {TRIED: target.specs, **alone}
    judges = {TRIED: target.row_judge} if target.row_judge else {}
    endpoints = {name: replace(one, max_wait=MOST_WAIT_S) for name, one in target.endpoints.items()}
    runner = RewardRunner(tasks, workers=workers, endpoints=endpoints, row_judges=judges)
    if unserved := [name for name in sorted(runner.endpoint_names()) if not target.endpoints[name].url]:
        raise ValueError(
            f"endpoint {unserved[0]!r} has no url, because a run starts its server; "
            "to use `try`, start the server and set the url"
        )
    runner.on_outage = _print_outage
    return runner


def _score_rows(runner: RewardRunner, samples: Sequence[Rollout]) -> list[Scored]:
    scores = runner.results([runner.submit_row(one.prompt, TRIED) for one in samples])
    return [
        Scored(one, score.value, score.invalid, details=score.details, seconds=score.seconds)
        for one, score in zip(samples, scores, strict=True)
    ]


def _print_outage(outage: Outage) -> None:
    if outage.again:
        return
    state = f"does not answer: {outage.why}; trying again for up to {MOST_WAIT_S:.0f} s" if outage.why else "is back"
    print(f"endpoint {outage.endpoint} {state}", file=sys.stderr)


def _as_lines(samples: Sequence[Rollout], scored: Sequence[Scored]) -> Iterator[str]:
    for sample, one in zip(samples, scored, strict=True):
        result = {"score": one.reward} if one.invalid is None else {"invalid": one.invalid}
        parts = {"parts": dict(one.parts)} if len(one.parts) > 1 else {}
        line = {
            "id": sample.prompt.id,
            **result,
            **parts,
            "details": dict(one.details),
            "seconds": round(one.seconds, 4),
        }
        yield json.dumps(line)


def _as_table(samples: Sequence[Rollout], scored: Sequence[Scored]) -> Iterator[str]:
    width = max(6, *(min(32, len(sample.prompt.id)) for sample in samples))
    yield f"{'sample':{width}}  {'score':>8}  {'seconds':>8}  details"
    for sample, one in zip(samples, scored, strict=True):
        score = f"{one.reward:8.4f}" if one.invalid is None else " invalid"
        parts = {"parts": dict(one.parts)} if len(one.parts) > 1 else {}
        details = json.dumps({**parts, **one.details}, ensure_ascii=False) if one.invalid is None else one.invalid
        yield f"{sample.prompt.id[:32]:{width}}  {score}  {one.seconds:8.3f}  {details[:200]}"
    valid = [one.reward for one in scored if one.invalid is None]
    mean = f"mean {sum(valid) / len(valid):.4f}, " if valid else ""
    yield f"{len(scored)} samples, {mean}{len(scored) - len(valid)} invalid"


def _check_truths(runner: RewardRunner, target: Target, prompts: Sequence[Prompt]) -> int:
    """Scores each ground truth as a response, and checks that each reward in `target.verifiable` gives this response
    the highest value.

    Returns the exit code.
    """
    distinct = {json.dumps([p.id, p.ground_truth], default=repr): p for p in prompts if p.ground_truth is not None}
    if not target.verifiable or not distinct:
        return DONE
    wrong = [
        line for task, spec in target.verifiable.items() for line in _failing(runner, task, spec, distinct.values())
    ]
    if not wrong:
        print(f"all {len(distinct)} ground truths, scored as responses, get the highest value", file=sys.stderr)
        return DONE
    print(f"{len(wrong)} ground truths, scored as responses, do not get the highest value:", file=sys.stderr)
    print(*wrong[:SHOWN], *(["  ..."] if len(wrong) > SHOWN else []), sep="\n", file=sys.stderr)
    return WRONG_INPUT


def _failing(runner: RewardRunner, task: str, spec: RewardSpec, prompts: Any) -> Iterator[str]:
    as_text = get(spec.use, spec.params).reward.truth_as_text
    assert as_text
    responses = [Rollout(replace(one, task=task), as_text(one.ground_truth)) for one in prompts]
    for one in runner.score(responses):
        if one.invalid or one.reward < runner.highest(task) - 1e-9:
            why = one.invalid or (
                f"gets {one.reward:g} instead of {runner.highest(task):g}; details: {json.dumps(dict(one.details))}"
            )
            yield f"  {one.rollout.prompt.id}: {one.rollout.text[:80]!r}: {why}"


if __name__ == "__main__":
    sys.exit(main())
