"""Makes one checked recipe for each step of a chain.

A recipe with the option `chain` runs several steps, one after the other, as one run:

    chain:
      - rlvr.yaml
      - curate: curate.yaml        # makes the rows for the next stage
      - pacore.yaml
    seed: 1                        # for all steps
    pacore: {iterations: 100}      # for one stage

A step has these layers: the step's own recipe < the chain's recipe < profile < key=value. Later layers override earlier
layers. A layer can have sections with options that apply to one stage only. Each stage starts from the policy of the
previous stage. A stage also starts from the critic of the previous stage, unless the option model.critic is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rl.recipe.layers import Layer, Layers, find_recipe, read, written_layers
from rl.recipe.resolve import RecipeError, Resolved, resolve, stage_of, yaml_of
from rl.recipe.stages import registered

CURATE = "curate"
LINK = "chain"
"""Name of the layer that contains the paths of earlier steps' results. The provenance of these values is this name."""


@dataclass(frozen=True)
class Step:
    """One step of a chain: a stage, or the curation of rows for the next stage. `name` is also the name of the step's
    folder."""

    name: str
    resolved: Resolved

    @property
    def curates(self) -> bool:
        """True if the step is a curation."""
        return self.name == CURATE


@dataclass(frozen=True)
class Chain:
    """The steps of one run, in order. Each step has its own folder inside the run folder."""

    folder: Path
    steps: tuple[Step, ...]

    def of(self, step: Step) -> Path:
        """Returns the folder of a step."""
        return self.folder / step.name

    def before(self, step: Step) -> tuple[Step, ...]:
        """Returns the steps before a step."""
        return self.steps[: self.steps.index(step)]

    def trained(self) -> list[Step]:
        """Returns the steps that train a policy. Curations are left out."""
        return [step for step in self.steps if not step.curates]


@dataclass(frozen=True)
class _Entry:
    """One entry of the option `chain`. `layers` are the layers of the entry's recipe."""

    name: str
    layers: tuple[Layer, ...]
    stage: str


def is_chain(recipe: Path) -> bool:
    """True if the recipe, or one of its base recipes, has the option `chain`. Raises RecipeError if a file cannot be
    read."""
    return any(layer.chain is not None for layer in read(recipe))


def load_chain(
    recipe: Path,
    folder: Path,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    first: str | None = None,
    begun: bool = False,
) -> Chain:
    """Makes and checks the recipe of every step. Files that an earlier step makes for a later step do not have to
    exist yet.

    Args:
        folder: the absolute path of the run folder. Each step writes its results there, and later steps read these
            results.
        first: the first stage that is run. Earlier steps are left out, but the curation that makes the rows of this
            stage is kept.
        begun: True if the file `recipe` was saved by a run.
    Raises:
        RecipeError: if a recipe cannot be used. The message tells the user everything that is needed to correct the
            recipe.
    """
    written = written_layers(recipe, profile, overrides)
    entries = _entries(written, begun=begun)
    _check_sections(written, entries)
    if first is not None:
        entries = _from(entries, first, written.main)
    steps: list[Step] = []
    for number, entry in enumerate(entries):
        links = _links(entry, steps, folder, written)
        if number == 0 and entry.name == CURATE:  # with --stage: curation uses the policy that the stage starts from
            rows = {"data": {"train": str(folder / CURATE / "rows")}}
            following = _resolved(entries[1], written, rows, folder, profile)
            links = {"model": {"path": following.config.model.path}}
        steps.append(Step(entry.name, _resolved(entry, written, links, folder, profile)))
    _check_curated_rows(steps)
    return Chain(folder, tuple(steps))


def saved_chain(chain: Chain) -> dict[str, str]:
    """Returns the files to save for a chain, as file name -> text. `load_chain` makes the same chain from these files.
    recipe.yaml is the last file.

    The files do not contain the paths of earlier steps' results, so that the run folder can be moved.
    """
    files: dict[str, str] = {}
    lines: list[Any] = []
    for step in chain.steps:
        file = f"recipes/{step.name}.yaml"
        values = step.resolved.plain()
        for key in [key for key, origin in step.resolved.provenance.items() if origin == LINK]:
            section, name = key.split(".")
            del values[section][name]
        files[file] = yaml_of(values)
        lines.append({CURATE: file} if step.curates else file)
    return files | {"recipe.yaml": yaml_of({"chain": lines})}


def _entries(written: Layers, *, begun: bool) -> list[_Entry]:
    *files, command_line = written.ordered
    if command_line.chain is not None:
        raise RecipeError("command line: chain belongs in a recipe file")
    source = next(layer for layer in reversed(files) if layer.chain is not None)
    where, items = source.where, source.chain
    if not isinstance(items, list) or not items:
        raise RecipeError(f"{where}: chain must be a list of recipes, such as [rlvr.yaml, pacore.yaml]")
    entries = [_entry(item, source) for item in items]
    names = [entry.name for entry in entries]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"{where}: chain has {repeated[0]} twice; the names of the steps must differ")
    if names[-1] == CURATE or (names[0] == CURATE and not begun):
        raise RecipeError(f"{where}: chain: curate belongs between two stages")
    return entries


def _entry(item: Any, source: Layer) -> _Entry:
    curates = isinstance(item, dict) and list(item) == [CURATE]
    file = item[CURATE] if curates else item
    if not isinstance(file, str):
        raise RecipeError(f"{source.where}: chain has the entry {item}; an entry must be RECIPE or curate: RECIPE")
    layers = tuple(read(find_recipe(file, f"{source.where}: chain: ", source.folder)))
    if any(layer.chain is not None for layer in layers):
        raise RecipeError(f"{source.where}: chain has the entry {file}, which is a chain itself")
    stage = stage_of(Layers(layers, layers[-1].where))
    return _Entry(CURATE if curates else stage, layers, stage)


def _check_sections(written: Layers, entries: Sequence[_Entry]) -> None:
    """Raises RecipeError for sections and options that would have no effect."""
    known = [entry.name for entry in entries]
    if unused := [name for name in written.ordered[-1].stages if name not in known]:
        raise RecipeError(f"command line: {unused[0]}.* is for the stage {unused[0]}; the steps are {', '.join(known)}")
    if staged := [layer for layer in written.ordered if "stage" in layer.values]:
        raise RecipeError(
            f"{staged[-1].where}: a chain has no option stage, because each of its recipes has a stage; leave out stage"
        )


def _from(entries: Sequence[_Entry], first: str, where: str) -> list[_Entry]:
    names = [entry.name for entry in entries]
    stages = [name for name in names if name in registered()]
    if first not in stages:
        raise RecipeError(f"{where}: the chain cannot begin with the stage {first}; its stages are {', '.join(stages)}")
    start = names.index(first)
    if start and names[start - 1] == CURATE:
        start -= 1  # this curation makes the rows of the stage `first`
    return list(entries[start:])


def _links(entry: _Entry, steps: Sequence[Step], folder: Path, written: Layers) -> dict[str, Any]:
    """Returns the options whose values are paths of earlier steps' results. Raises RecipeError if the section of this
    stage sets one of these options."""
    trained = [step for step in steps if not step.curates]
    links: dict[str, Any] = {}
    if trained:
        last = trained[-1]
        model = {"path": str(folder / last.name / "policy")}
        if entry.name != CURATE and not _sets_critic(entry, written):
            newest = f"{last.resolved.config.iterations:06d}"
            model["critic"] = str(folder / last.name / "checkpoints" / newest / "critic")
        links["model"] = model
        if entry.name != CURATE:
            _check_not_set("model.path", entry, written, f"the stage starts from the policy of {last.name}")
    if steps and steps[-1].curates:
        _check_not_set("data.train", entry, written, "the stage trains on the rows of the previous curation")
        renamed = [key.removeprefix("data.columns.") for key in _keys(entry, written, "data.columns.")]
        columns = {name: name for name in renamed}  # curated rows have our column names
        rows: dict[str, Any] = {"path": str(folder / CURATE / "rows")}
        train = [rows | {"columns": columns}] if columns else rows["path"]
        links["data"] = {"train": train, "on_bad_row": "skip"}  # a row with too few messages must not stop the run
    return links


def _sections(entry: _Entry, written: Layers) -> list[Layer]:
    """Returns the sections whose options apply to this stage only. They come from the chain's recipe, the profile and
    the command line."""
    return [part for layer in written.ordered for part in layer.for_stage(entry.stage)[1:]]


def _sets_critic(entry: _Entry, written: Layers) -> bool:
    """True if a layer sets the critic that this stage starts from. A layer can also set model.critic for the whole
    chain. If this value is a path, the path applies to the first stage only. If the value is null, null applies to all
    stages."""
    own = [part for layer in entry.layers for part in layer.for_stage(entry.stage)] + _sections(entry, written)
    return any("model.critic" in layer.flat for layer in own) or any(
        layer.flat.get("model.critic", "") is None for layer in written.ordered
    )


def _check_not_set(key: str, entry: _Entry, written: Layers, why: str) -> None:
    if setting := [layer for layer in _sections(entry, written) if layer.touches(key)]:
        raise RecipeError(f"{setting[-1].where}: {entry.stage}.{key} cannot be set in a chain: {why}")


def _keys(entry: _Entry, written: Layers, prefix: str) -> list[str]:
    """Returns the dotted names that begin with `prefix` and have a value in one of the step's layers."""
    layers = (*entry.layers, *written.ordered, *_sections(entry, written))
    return sorted({key for layer in layers for key in layer.flat if key.startswith(prefix)})


def _resolved(entry: _Entry, written: Layers, links: dict[str, Any], folder: Path, profile: str | None) -> Resolved:
    link = Layer(LINK, LINK, folder, OmegaConf.create(links))
    layers = Layers((*entry.layers, *written.ordered, link), entry.layers[-1].where)
    return resolve(layers, entry.stage, profile)


def _check_curated_rows(steps: Sequence[Step]) -> None:
    """Raises RecipeError if a stage cannot train on the rows that the previous curation makes."""
    for curation, step in pairwise(steps):
        if curation.curates:
            config = step.resolved.config
            if problem := registered()[config.stage].curation_problem(config, curation.resolved.config.curate):
                raise RecipeError(problem)
