"""Ray's one door: plain objects, each in a process of its own with its share of CPUs and GPUs.

An object does not know that it is remote, and the loop does not care: `place` gives a Worker whose `call` answers
like the object itself, and whose `start` answers later.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from rl.stop import SourceDied, WorkerDied

ROOT = Path(__file__).parent.parent
_SILENT = "a worker process of the run gave no sign of life for {:g} s"
MOST_SPANS = 10_000  # that a process remembers while nobody asks


class _Holder:
    """What runs in the actor's process: makes the object there and hands calls to it."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.target: Any = None
        self._spans: deque[tuple[str, float, float]] = deque(maxlen=MOST_SPANS)

    def spans(self) -> list[tuple[str, float, float]]:
        """(method, first and last moment) of what was done since the last time this was asked."""
        told = list(self._spans)
        self._spans.clear()
        return told

    @contextmanager
    def _span(self, method: str) -> Iterator[None]:
        start = time.time()
        yield
        self._spans.append((method, start, time.time()))

    def free_address(self) -> str:
        """host:port on this node at which other processes can meet."""
        host = node_address()
        with socket.socket() as found:
            found.bind((host, 0))
            return f"{host}:{found.getsockname()[1]}"

    def make(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.target = factory(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        there = [_Fetched(a) if isinstance(a, dict) else a for a in args]
        with self._span(method):
            return getattr(self.target, method)(*there, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        with self._span(method):
            yield from getattr(self.target, method)(*args)


class Later:
    """An answer that may not be there yet. Given as an argument to another `start`, by itself or as a value of a
    mapping, it travels without passing through this process."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def result(self, patience: float | None = None) -> Any:
        """Waits; raises what the method raised, or WorkerDied if its process died, or did not answer for `patience`
        seconds."""
        return _get(self.reference, patience)


class _Fetched(Mapping[str, Any]):
    """A mapping whose values may be answers of other processes: each is fetched when it is first looked at."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given, self._found = given, dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        if key not in self._found:
            value = self._given[key]
            self._found[key] = value.result() if isinstance(value, Later) else value
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


@contextmanager
def signals_as_raised() -> Iterator[None]:
    """What a signal's handler raises while Ray waits, as it was raised: if the wait ends at that moment, Ray returns
    with the exception pending, and Python makes a SystemError of it."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _get(reference: Any, patience: float | None = None) -> Any:
    try:
        with signals_as_raised():
            return ray.get(reference, timeout=patience)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RayError):
            raise SourceDied(f"a worker process of the run died, and others waited for it: {error.cause}") from error
        raise error.as_instanceof_cause() from None
    except ray.exceptions.GetTimeoutError:
        raise WorkerDied(_SILENT.format(patience)) from None
    except RayError as error:
        raise WorkerDied(f"a worker process of the run died: {error}") from error


class Worker:
    """An object in an actor."""

    def __init__(self, actor: Any, made: Later) -> None:
        self._actor, self.made = actor, made

    def ready(self, patience: float | None = None) -> None:
        """Waits until the object exists; raises what its constructor raised, or WorkerDied after `patience` seconds."""
        self.made.result(patience)

    def spans(self) -> Later:
        """What it has done since this was asked last: (method, first and last moment in seconds since 1970)."""
        return Later(self._actor.spans.remote())

    def end(self) -> None:
        """Stop its process at once."""
        ray.kill(self._actor)

    def start(self, method: str, *args: Any, **kwargs: Any) -> Later:
        """Begin `object.method(...)`; calls to one worker run in order."""
        plain = [a.reference if isinstance(a, Later) else a for a in args]
        return Later(self._actor.call.remote(method, *plain, **kwargs))

    def stream(self, method: str, *args: Any) -> Any:
        """Begin the generator `object.method(...)`; `as_they_come` has what it yields."""
        return self._actor.stream.options(num_returns="streaming").remote(method, *args)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """`object.method(...)`, waited for."""
        return self.start(method, *args, **kwargs).result()


class Together(Later):
    """The answer of several workers to one call, which is the first one's."""

    def __init__(self, team: "Team", pending: Sequence[Later]) -> None:
        super().__init__(pending[0].reference)
        self._team, self._pending = team, list(pending)

    def result(self, patience: float | None = None) -> Any:
        """Waits for all; if one fails, the others, which may wait for it for ever, are ended."""
        waiting = {later.reference: later for later in self._pending}
        patience = patience or self._team.patience
        try:
            while waiting:
                with signals_as_raised():
                    ready = ray.wait(list(waiting), num_returns=1, timeout=patience)[0]
                if not ready:
                    raise WorkerDied(_SILENT.format(patience))
                for reference in ready:
                    waiting.pop(reference).result()
        except Exception:  # whatever it was, it is raised again
            if waiting:
                self._team.end()
            raise
        return super().result()


class Team:
    """Workers that hold one model together: they get every call, in the same order, and answer as one.

    Args:
        patience: seconds without the next of their answers after which they count as hung; None waits for ever.
    """

    def __init__(self, workers: Sequence[Worker], patience: float | None = None) -> None:
        self.workers, self.patience = list(workers), patience

    def ready(self, patience: float | None = None) -> None:
        """Waits until all objects exist; raises what a constructor raised, or WorkerDied after `patience` seconds."""
        Together(self, [worker.made for worker in self.workers]).result(patience)

    def start(self, method: str, *args: Any) -> Together:
        """Begin `object.method(...)` on all."""
        if len(self.workers) > 1:  # store what they all need once
            args = tuple(a if isinstance(a, Later | dict) else Later(ray.put(a)) for a in args)
        return Together(self, [worker.start(method, *args) for worker in self.workers])

    def call(self, method: str, *args: Any) -> Any:
        """`object.method(...)`, waited for."""
        return self.start(method, *args).result()

    def end(self) -> None:
        """Stop all processes at once."""
        for worker in self.workers:
            worker.end()


def _actor(factory: Any, cpus: float, gpus: float, environment: Mapping[str, str] | None) -> Any:
    """A process that waits to be told what to make. `ps` and Ray's dashboard call it by the class that it is for."""
    name = getattr(factory, "__self__", factory).__name__  # of_rank is a method of the class
    remote: Any = ray.remote(type(name, (_Holder,), {}))
    return remote.options(num_cpus=cpus, num_gpus=gpus).remote(dict(environment or {}))


def place_team(
    make: Callable[..., Any],
    *args: Any,
    count: int,
    cpus: float = 0,
    gpus: float = 0,
    environment: dict[str, str] | None = None,
    patience: float | None = None,
) -> Team:
    """Make `make(*args, rank, count, address)` in `count` actors that can meet at `address`. Returns at once if one
    is enough, else when the first actor's process runs."""
    actors = [_actor(make, cpus, gpus, environment) for _ in range(count)]
    address = _get(actors[0].free_address.remote()) if count > 1 else None
    made = [Later(a.make.remote(make, (*args, rank, count, address), {})) for rank, a in enumerate(actors)]
    return Team([Worker(actor, one) for actor, one in zip(actors, made, strict=True)], patience)


def place(
    factory: Callable[..., Any],
    *args: Any,
    cpus: float = 0,
    gpus: float = 0,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> Worker:
    """Make `factory(*args, **kwargs)` in an actor. Returns at once, so that several start side by side.

    Args:
        environment: variables set in its process before anything heavy is imported.
    """
    actor = _actor(factory, cpus, gpus, environment)
    return Worker(actor, Later(actor.make.remote(factory, args, kwargs)))


def gather(pending: Sequence[Later]) -> list[Any]:
    """All answers, in order; the first failure is raised."""
    return [later.result() for later in pending]


def as_they_come(streams: Sequence[Any], patience: float) -> Iterator[tuple[int, Any]]:
    """What several generators (of Worker.stream) yield, in the order of its arrival, with each one's index.

    One whose process died, or that yielded nothing for `patience` seconds, ends with a WorkerDied in place of a value.
    """
    running: dict[Any, int] = {stream: index for index, stream in enumerate(streams)}
    heard = dict.fromkeys(running, time.monotonic())
    while running:
        with signals_as_raised():
            ready: list[Any] = ray.wait(list(running), num_returns=1, timeout=patience / 4)[0]
        for stream in ready:
            try:
                reference = next(stream)
            except StopIteration:
                del running[stream]
                continue
            try:
                value, heard[stream] = _get(reference), time.monotonic()
            except WorkerDied as died:
                value = died
            yield running[stream], value
            if isinstance(value, WorkerDied):
                del running[stream]
        for stream in [stream for stream in running if time.monotonic() - heard[stream] > patience]:
            yield running.pop(stream), WorkerDied(_SILENT.format(patience))


@contextmanager
def cluster(*, verbose: bool = False) -> Iterator[None]:
    """Join the Ray cluster that RAY_ADDRESS names (a submitted job has it set), or start one on this machine.

    A cluster that was started here ends with the block; one that was joined keeps running without our actors.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}},
        "log_to_driver": verbose,
        "logging_level": "info" if verbose else "error",
    }
    if address:
        ray.init(address=address, **options)
    else:
        # Else Ray leaves a token in the home folder, and any cluster started later asks for it. Ours is reached
        # from this machine only.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    try:
        yield
    finally:
        ray.shutdown()


def node_address() -> str:
    """Address at which other nodes of the cluster reach this one."""
    return ray.util.get_node_ip_address()


def alone() -> bool:
    """Whether the cluster is one that `cluster` started, on this machine only."""
    return not os.environ.get("RAY_ADDRESS")


def gpus() -> int:
    """GPUs of the cluster that has been joined or started."""
    return int(ray.cluster_resources().get("GPU", 0))
