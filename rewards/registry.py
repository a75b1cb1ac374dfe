"""The registry of rewards: `@reward` and similar decorators register rewards; `get` finds a reward and checks
parameters."""

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from rewards.endpoint import is_endpoint_name

OnTimeout = Literal["invalid", "lowest"]
Kind = Literal["reward", "penalty", "row judge"]
Needed = Literal["ground_truth", "reference"]
ENTRY_POINTS = "rl.rewards"
Target = TypeVar("Target", bound=Callable[..., Any])


class Invalid(Exception):
    """Raised by a reward that cannot score a sample, for a reason that the policy did not cause (a bad ground truth,
    a dead endpoint). The sample is left out of the loss and counted in reward/invalid_fraction."""


@dataclass(frozen=True)
class Score:
    """A reward's value, and JSON-able details that are stored with the sample."""

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """A registered reward, penalty or row judge: its function or class, and the values that its decorator sets."""

    name: str
    target: Callable[..., Any]
    kind: Kind
    timeout_s: float
    group: bool = False
    lowest: float = 0.0
    highest: float = 1.0
    on_timeout: OnTimeout = "invalid"
    truth_as_text: Callable[[Any], str] | None = None
    needs: Needed | None = None

    @property
    def asynchronous(self) -> bool:
        """True for an async reward, such as a reward that asks an endpoint. With an async reward, one process scores
        many samples at once."""
        function = self.target.__call__ if inspect.isclass(self.target) else self.target
        return inspect.iscoroutinefunction(function)

    @property
    def source(self) -> str:
        """The path of the file that defines the reward, or the module's name if there is no file."""
        return getattr(sys.modules.get(self.target.__module__), "__file__", None) or self.target.__module__

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that a recipe may set: for a class, the parameters of `__init__`; for a function, all
        parameters but the first."""
        parameters = list(inspect.signature(self.target).parameters.values())
        return {p.name: p for p in (parameters if inspect.isclass(self.target) else parameters[1:])}

    def annotation(self, parameter: inspect.Parameter) -> Any:
        """Returns the parameter's annotation as an object. A string annotation is evaluated."""
        if not isinstance(parameter.annotation, str):
            return parameter.annotation
        # The annotation is a string because of `from __future__ import annotations`. It comes from the reward's author,
        # so eval is safe.
        owner = self.target.__init__ if inspect.isclass(self.target) else self.target
        return eval(parameter.annotation, getattr(owner, "__globals__", {}))


@dataclass(frozen=True)
class BoundReward:
    """A reward with checked parameters.

    A call with a rollout returns the reward's result: a number, a Score, or an awaitable that gives a number or a
    Score. A group reward takes a list of rollouts and returns a list. A row judge takes a Prompt. The first call runs
    `setup()`.
    """

    reward: Reward
    params: Mapping[str, Any]

    @property
    def endpoints(self) -> list[str]:
        """The names of the endpoints that the reward asks: the values of its parameters of type EndpointName."""
        accepted = self.reward.parameters
        names = [name for name, p in accepted.items() if is_endpoint_name(self.reward.annotation(p))]
        values = [self.params.get(name, accepted[name].default) for name in names]
        return [value for value in values if isinstance(value, str)]

    @cached_property
    def version(self) -> str:
        """A digest of the reward's code and parameters, 16 hexadecimal digits. It changes if the score of a response
        may have changed. The code of a reward in a file is this file. The code of a reward in a package is all files of
        the package."""
        file = Path(inspect.getfile(self.reward.target))
        package = (sys.modules[self.reward.target.__module__].__package__ or "").partition(".")[0]
        root = next((folder for folder in file.parents if package and folder.name == package), None)
        files = sorted(one for one in root.rglob("*") if one.suffix in CODE) if root else [file]
        digest = hashlib.sha256(json.dumps(self.params, sort_keys=True, default=repr).encode())
        for one in files:
            digest.update(hashlib.sha256(one.read_bytes()).digest())
        return digest.hexdigest()[:16]

    @cached_property
    def scorer(self) -> Callable[..., Any]:
        """The reward's function, or an instance of its class. The first access creates the instance and runs
        `setup()`."""
        if not inspect.isclass(self.reward.target):
            return self.reward.target
        instance: Any = self.reward.target(**self.params)
        if hasattr(instance, "setup"):
            instance.setup()
        return instance

    def __call__(self, rollouts: Any) -> Any:
        scorer = self.scorer
        return scorer(rollouts) if inspect.isclass(self.reward.target) else scorer(rollouts, **self.params)


CODE = (".py", ".jinja", ".yaml")
"""The files of a package with these endings are the code of its rewards."""

# A name maps to a list because two files outside the project may register the same name. This is an error only if a
# recipe uses the name without a file.
_REGISTRY: dict[str, list[Reward]] = {}


def reward(
    name: str,
    *,
    group: bool = False,
    lowest: float = 0.0,
    highest: float = 1.0,
    on_timeout: OnTimeout = "invalid",
    verifiable: bool | Callable[[Any], str] = False,
    timeout_s: float = 10.0,
    needs: Needed | None = None,
) -> Callable[[Target], Target]:
    """Registers a reward: a `def`, an `async def`, or a class with `__call__` (and `setup()` if it loads something).

    group       True if the reward takes the list of all rollouts of one prompt, and returns a list of scores in the
                same order
    lowest      the lowest value that the reward can return; truncated responses and unreadable text get this value
    highest     the value of a fully right response
    on_timeout  what happens to a sample that runs out of time or memory. "invalid": it is left out of the loss.
                "lowest": it gets the lowest value. Use "lowest" only if the time and the memory of the reward depend
                only on the policy's text
    verifiable  True if a response that states only the row's ground truth gets `highest`; `python -m rewards try` then
                checks this. The response is the ground truth itself if it is text, else its JSON. If such a response
                does not get `highest`, pass a function that converts a ground truth into a response that gets
                `highest`
    timeout_s   time limit of one sample in seconds; a recipe may set another limit
    needs       the field that each row must have: "ground_truth" (the default of a verifiable reward) or "reference",
                the teacher's response. The rows are checked before a run starts
    """
    return _register(
        name,
        kind="reward",
        timeout_s=timeout_s,
        group=group,
        lowest=float(lowest),
        highest=float(highest),
        on_timeout=on_timeout,
        truth_as_text=as_response if verifiable is True else verifiable or None,
        needs=needs or ("ground_truth" if verifiable else None),
    )


def penalty(
    name: str, *, group: bool = False, on_timeout: OnTimeout = "invalid", timeout_s: float = 10.0
) -> Callable[[Target], Target]:
    """Registers a behaviour penalty. It is written like a reward. It returns the offence, a number that says how badly
    the rollout breaks a rule: from 0 (not at all) to 1 (fully). A recipe lists penalties under a reward. The penalties
    lower the reward's value towards the lowest value of the reward:

        lowest + (value - lowest) * product over penalties of (1 - magnitude * offence)
    """
    return _register(name, kind="penalty", timeout_s=timeout_s, group=group, on_timeout=on_timeout)


def row_judge(name: str, *, timeout_s: float = 10.0) -> Callable[[Target], Target]:
    """Registers a judge of data rows, for curation. It is written like a reward, but takes a Prompt instead of a
    Rollout, and returns a number from 0 to 1. A recipe cannot list it under `rewards`."""
    return _register(name, kind="row judge", timeout_s=timeout_s)


def _register(name: str, **declared: Any) -> Callable[[Target], Target]:
    def register(target: Target) -> Target:
        entry = Reward(name, target, **declared)
        if entry.on_timeout not in ("invalid", "lowest"):
            problem = f"on_timeout is {entry.on_timeout!r}; it must be 'invalid' or 'lowest'"
            raise ValueError(f"{entry.kind} {name!r}: {problem}")
        others = [r for r in _REGISTRY.get(name, []) if r.source != entry.source]
        _REGISTRY[name] = [*others, entry]
        target.__reward__ = entry  # type: ignore[attr-defined]  # so that file.py:Name finds it
        return target

    return register


def as_response(truth: Any) -> str:
    """Returns a response that states only the ground truth. Text stays unchanged; anything else becomes JSON."""
    return truth if isinstance(truth, str) else json.dumps(truth)


def names() -> list[str]:
    """Returns all names that `get` accepts: the names of built-in rewards, imported rewards and entry points."""
    _import_builtin()
    return sorted({*_REGISTRY, *(e.name for e in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def all_rewards() -> list[Reward]:
    """Returns the rewards of all names that `names()` returns, sorted by name. Raises ValueError for an entry point
    that cannot be loaded."""
    by_name = {reward.name: reward for name in names() for reward in _REGISTRY.get(name, []) or [_by_name(name)]}
    return [by_name[name] for name in sorted(by_name)]


def get(
    target: str,
    params: Mapping[str, Any] | None = None,
    base_dir: str | Path | None = None,
    endpoints: Container[str] | None = None,
) -> BoundReward:
    """Returns the reward that `use: target` in a recipe refers to, together with its parameters.

    `base_dir` is the folder that `file.py:Name` is relative to (default: the current folder). Raises ValueError if the
    target does not exist (the message suggests the nearest name), or if the parameters do not fit the reward's
    signature. If `endpoints` is given, also raises ValueError for a parameter with the name of an endpoint that is not
    in `endpoints`.
    """
    reward = _by_place(target, Path(base_dir or ".")) if ":" in target else _by_name(target)
    bound = BoundReward(reward, _checked(reward, dict(params or {})))
    for name in bound.endpoints:
        if endpoints is not None and name not in endpoints:
            raise ValueError(
                f"reward {reward.name!r} asks the endpoint {name!r}, which the recipe does not have: add it under "
                f"endpoints, as in endpoints: {{{name}: {{url: http://HOST:8000/v1, model: NAME}}}}"
            )
    return bound


def _import_builtin() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg and not module.name.startswith("_"):
            importlib.import_module(f"rewards.{module.name}")


def _by_name(name: str) -> Reward:
    _import_builtin()
    entries = _REGISTRY.get(name, [])
    if len(entries) > 1:
        places = " and ".join(r.source for r in entries)
        raise ValueError(f"several rewards are called {name!r}: in {places}; write file.py:Name instead")
    if entries:
        return entries[0]
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        try:
            loaded = entry.load()
        except Exception as e:  # the package's own code may raise anything
            raise ValueError(f"entry point {name} = {entry.value} cannot be loaded: {type(e).__name__}: {e}") from e
        return _declared(loaded, f"entry point {name} = {entry.value}")
    known = names()
    raise ValueError(f"no reward is called {name!r}{_nearest(name, known)}; there are: {', '.join(known)}")


def _by_place(target: str, base_dir: Path) -> Reward:
    place, _, name = target.rpartition(":")
    try:
        module = load_module(place, base_dir)
    except ValueError as e:
        raise ValueError(f"reward {target!r}: {e}") from e
    return _member(module, name, target)


def load_module(place: str, base_dir: Path) -> ModuleType:
    """Imports `place`: a module's name, or a file (relative to `base_dir`) if it ends in ".py".

    Raises ValueError if the module does not exist or cannot be imported.
    """
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except Exception as e:  # the module's own code may raise anything
            raise ValueError(
                f"cannot import {place}: {type(e).__name__}: {e}; run the command where Python can find this module"
            ) from e
    path = (base_dir / place).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return _load_file(path)


def _load_file(path: Path) -> ModuleType:
    alias = f"reward_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec and spec.loader, path
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # the folder is last, so that its files do not hide other modules
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the file's own code may raise anything
        del sys.modules[alias]
        raise ValueError(f"reward file {path} cannot be imported: {type(e).__name__}: {e}") from e
    return module


def _member(module: ModuleType, name: str, target: str) -> Reward:
    """Returns the reward in `module` whose Python name or registered name is `name`."""
    rewards = {key: r for key, value in vars(module).items() if isinstance(r := _declaration(value), Reward)}
    rewards |= {r.name: r for r in rewards.values() if r.name not in rewards}
    if name in rewards:
        return rewards[name]
    if hasattr(module, name):
        return _declared(getattr(module, name), target)
    raise ValueError(
        f"reward {target!r}: {module.__file__} has no {name!r}{_nearest(name, list(rewards))}; "
        f"its rewards are: {', '.join(sorted(rewards)) or 'none'}"
    )


def _declaration(value: Any) -> Reward | None:
    # getattr(value, "__reward__") would also find the declaration of a base class; a subclass must not inherit it
    return getattr(value, "__dict__", {}).get("__reward__")


def _declared(value: Any, where: str) -> Reward:
    reward = _declaration(value)
    if not isinstance(reward, Reward):
        raise ValueError(f"{where} is no reward; put @reward('its_name') above its definition")
    return reward


def _checked(reward: Reward, params: dict[str, Any]) -> dict[str, Any]:
    accepted = reward.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for key in params:
            if key not in accepted:
                near, takes = _nearest(key, list(accepted)), ", ".join(accepted) or "none"
                raise ValueError(f"reward {reward.name!r} has no parameter {key!r}{near}; it takes: {takes}")
    for p in accepted.values():
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in params:
            raise ValueError(f"reward {reward.name!r} needs the parameter {p.name!r}")
    return {key: _typed(reward, accepted.get(key), key, value) for key, value in params.items()}


def _typed(reward: Reward, parameter: inspect.Parameter | None, key: str, value: Any) -> Any:
    """Converts `value` to the parameter's annotated type. A parameter without annotation takes any value unchanged."""
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        return _adapter(reward.annotation(parameter)).validate_python(value)
    except ValidationError as e:
        why = e.errors()[0]["msg"]
        raise ValueError(f"reward {reward.name!r}: parameter {key} is {value!r}: {why}") from e


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # pydantic models and dataclasses have their own config, so a second config is an error
        return TypeAdapter(annotation)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
