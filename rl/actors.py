"""Places plain objects in separate processes, each with its own CPUs and GPUs. Only this file imports Ray.

The objects themselves do not depend on Ray. `place` returns a RemoteObject, and `place_team` returns a Team. Both types
implement rl.remote.Remote.
"""

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError

from rl.interrupt import SIGNALS, Interrupted
from rl.stop import SourceDied, Stop, WorkerDied

ROOT = Path(__file__).parent.parent
SILENT = "a worker process of the run gave no sign of life for {:g} s"
NICENESS = "RAY_worker_niceness"  # Ray reads this variable in each worker process
MOST_SPANS = 10_000  # a process keeps at most this number of spans until they are fetched
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class _Holder:
    """The class of the Ray actor. A _Holder creates an object in the actor's process and calls the methods of this
    object."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.target: Any = None
        self._spans: deque[tuple[str, float, float]] = deque(maxlen=MOST_SPANS)

    def spans(self) -> list[tuple[str, float, float]]:
        """Returns (method, start, end) of each method call that ended since `spans` was last called."""
        spans = list(self._spans)
        self._spans.clear()
        return spans

    @contextmanager
    def _span(self, method: str) -> Iterator[None]:
        start = time.time()
        yield
        self._spans.append((method, start, time.time()))

    def free_address(self) -> str:
        """Returns the address (host:port) of a free port on this node, for a process group."""
        host = node_address()
        with socket.socket() as listener:
            listener.bind((host, 0))
            return f"{host}:{listener.getsockname()[1]}"

    def make(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.target = factory(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        fetched = [_Fetched(a) if isinstance(a, dict) else a for a in args]
        with self._span(method):
            return getattr(self.target, method)(*fetched, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        with self._span(method):
            yield from getattr(self.target, method)(*args)


class RemoteFuture(Generic[R]):
    """The result of a remote call. A RemoteFuture can be an argument of another `start`. It can also be a value in a
    mapping that is an argument. The result then goes directly from process to process, and this process makes no
    copy."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def result(self, patience: float | None = None) -> R:
        """Waits for the result.

        Raises the exception of the method, or WorkerDied if the process died or did not answer for `patience` seconds.
        """
        return _get(self.reference, patience)


class _Fetched(Mapping[str, Any]):
    """A mapping whose values may be futures. A future is fetched when its key is first read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self._fetched = values, dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        if key not in self._fetched:
            value = self._values[key]
            self._fetched[key] = value.result() if isinstance(value, RemoteFuture) else value
        return self._fetched[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@contextmanager
def signals_as_raised() -> Iterator[None]:
    """Restores the exception of a signal handler in a `with` block. If the block raises a SystemError that has a cause,
    the cause is raised in place of the SystemError.

    A signal may arrive at the moment at which Ray stops waiting. Ray then returns a value although the signal handler
    has raised an exception, and Python raises a SystemError.
    """
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
            raise SourceDied(f"a process of the run died while another process waited for it: {error.cause}") from error
        if isinstance(error.cause, Stop):  # its message is for the user and needs no traceback of the other process
            raise error.cause from None
        raise error.as_instanceof_cause() from None
    except ray.exceptions.GetTimeoutError:
        raise WorkerDied(SILENT.format(patience)) from None
    except RayError as error:
        raise WorkerDied(f"a worker process of the run died: {error}") from error


class RemoteObject(Generic[T]):
    """An object in a Ray actor.

    Args:
        created: a future that is done when the object exists.
        name: class of the object. While the actor works, `ps` shows `ray::NAME.METHOD` as the name of its process.
    """

    def __init__(self, actor: Any, created: RemoteFuture[None], name: str) -> None:
        self._actor, self.created, self._name = actor, created, name

    @property
    def ranks(self) -> "list[RemoteObject[T]]":
        """A list that contains only this object, because the object has a single process."""
        return [self]

    def ready(self, patience: float | None = None) -> None:
        """Waits until the object exists. Raises the exception of its constructor, or WorkerDied after `patience`
        seconds."""
        self.created.result(patience)

    def spans(self) -> RemoteFuture[list[tuple[str, float, float]]]:
        """Returns (method, start, end) of each method call that ended since `spans` was last called. Start and end are
        in seconds since 1970."""
        return RemoteFuture(self._actor.spans.remote())

    def end(self) -> None:
        """Kills the process."""
        ray.kill(self._actor)

    def start(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> RemoteFuture[R]:
        """Starts `method(object, *args)` and returns at once. Calls to the same object run one after the other, in
        order."""
        references = [a.reference if isinstance(a, RemoteFuture) else a for a in args]
        call = self._actor.call.options(name=f"{self._name}.{method.__name__}")
        return RemoteFuture(call.remote(method.__name__, *references, **kwargs))

    def stream(self, method: Callable[Concatenate[T, P], Iterator[Any]], *args: P.args, **kwargs: P.kwargs) -> Any:
        """Starts the generator `method(object, *args)`. Use `merge_streams` to read the values."""
        streaming = self._actor.stream.options(num_returns="streaming", name=f"{self._name}.{method.__name__}")
        return streaming.remote(method.__name__, *args, **kwargs)


class TeamFuture(RemoteFuture[R]):
    """The result of a call that runs on all ranks. `result` waits for all ranks and returns the value of rank 0."""

    def __init__(self, team: "Team[Any]", pending: Sequence[RemoteFuture[R]]) -> None:
        super().__init__(pending[0].reference)
        self._team, self._pending = team, list(pending)

    def result(self, patience: float | None = None) -> R:
        """Waits for all ranks. If one rank fails, all processes are killed, because the other ranks might wait for the
        failed rank for ever."""
        waiting = {future.reference: future for future in self._pending}
        patience = patience or self._team.patience
        try:
            while waiting:
                with signals_as_raised():
                    ready = ray.wait(list(waiting), num_returns=1, timeout=patience)[0]
                if not ready:
                    raise WorkerDied(SILENT.format(patience))
                for reference in ready:
                    waiting.pop(reference).result()
        except Exception:  # the `raise` below raises every error again
            if waiting:
                self._team.end()
            raise
        return super().result()


class Team(Generic[T]):
    """One object that is split over several processes, called ranks. Every rank gets all calls in the same order.

    Args:
        patience: if no rank answers for this number of seconds, the team counts as hung. None: there is no limit.
    """

    def __init__(self, ranks: Sequence[RemoteObject[T]], patience: float | None = None) -> None:
        self.ranks, self.patience = list(ranks), patience

    def ready(self, patience: float | None = None) -> None:
        """Waits until all ranks exist. Raises the exception of a constructor, or WorkerDied after `patience`
        seconds."""
        TeamFuture(self, [rank.created for rank in self.ranks]).result(patience)

    def start(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> TeamFuture[R]:
        """Starts `method(object, *args)` on all ranks."""
        shared: Any = args
        if len(self.ranks) > 1:  # store each argument once for all ranks
            shared = [a if isinstance(a, RemoteFuture | dict) else RemoteFuture(ray.put(a)) for a in args]
        return TeamFuture(self, [rank.start(method, *shared, **kwargs) for rank in self.ranks])

    def end(self) -> None:
        """Kills all processes."""
        for rank in self.ranks:
            rank.end()


def _class_name(factory: Any) -> str:
    """Returns the name of the class that `factory` creates. `factory` is the class or its class method."""
    return getattr(factory, "__self__", factory).__name__


def _actor(factory: Any, cpus: float, gpus: float, environment: Mapping[str, str] | None) -> Any:
    """Starts a process in which the object will be created. `ps` and Ray's dashboard show the class of the object as
    the name of the process."""
    remote: Any = ray.remote(type(_class_name(factory), (_Holder,), {}))
    return remote.options(num_cpus=cpus, num_gpus=gpus).remote(dict(environment or {}))


def place_team(
    make: Callable[..., T],
    *args: Any,
    count: int,
    cpus: float = 0,
    gpus: float = 0,
    environment: dict[str, str] | None = None,
    patience: float | None = None,
    start_s: float | None = None,
) -> Team[T]:
    """Starts `count` actors and calls `make(*args, rank, count, address)` in each actor. The actors form a process
    group at `address`.

    Returns at once if `count` is 1. Otherwise waits until the process of the first actor runs. Raises WorkerDied if
    this process does not run after `start_s` seconds, for example because other programs use all GPUs.
    """
    actors = [_actor(make, cpus, gpus, environment) for _ in range(count)]
    address = _get(actors[0].free_address.remote(), start_s) if count > 1 else None
    created = [RemoteFuture(a.make.remote(make, (*args, rank, count, address), {})) for rank, a in enumerate(actors)]
    name = _class_name(make)
    return Team([RemoteObject(*pair, name) for pair in zip(actors, created, strict=True)], patience)


def place(
    factory: Callable[..., T],
    *args: Any,
    cpus: float = 0,
    gpus: float = 0,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> RemoteObject[T]:
    """Calls `factory(*args, **kwargs)` in a new actor. Returns at once, so that several actors can start at the same
    time.

    Args:
        environment: environment variables that are set in the actor's process before it imports large libraries.
    """
    actor = _actor(factory, cpus, gpus, environment)
    created = RemoteFuture(actor.make.remote(factory, args, kwargs))
    return RemoteObject(actor, created, _class_name(factory))


def merge_streams(streams: Sequence[Any], patience: float) -> Iterator[tuple[int, Any]]:
    """Reads several streams that RemoteObject.stream has started. Yields (index of the stream, value) in the order in
    which values arrive.

    If a process dies, or yields nothing for `patience` seconds, the last value of its stream is a WorkerDied.
    """
    running: dict[Any, int] = {stream: index for index, stream in enumerate(streams)}
    last_value = dict.fromkeys(running, time.monotonic())
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
                value, last_value[stream] = _get(reference), time.monotonic()
            except WorkerDied as died:
                value = died
            yield running[stream], value
            if isinstance(value, WorkerDied):
                del running[stream]
        for stream in [stream for stream in running if time.monotonic() - last_value[stream] > patience]:
            yield running.pop(stream), WorkerDied(SILENT.format(patience))


@contextmanager
def _signals_kept() -> Iterator[None]:
    """A `with` block in which Ray starts. Afterwards, the command's signal handlers are the same as before, and Ray's
    processes do not end because of a signal to the command.

    Ray replaces the handler of SIGTERM with one that ends the process at once. A terminal and the program `timeout`
    send a signal to a whole process group, and some batch systems send it to all processes of a job. So each of Ray's
    processes gets a process group of its own, and ignores the signals that only stop commands.

    Raises: Interrupted if SIGTERM arrives in the block.
    """
    global _ray_starts
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    _ray_starts = True
    try:
        yield
    except SystemExit:  # raised by Ray's handler
        raise Interrupted from None
    finally:
        _ray_starts = False
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _in_child() -> None:
    """Prepares a process that is started while Ray starts. Runs in the new process, before its program."""
    if _ray_starts:
        os.setpgid(0, 0)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


_ray_starts = False
os.register_at_fork(after_in_child=_in_child)


@contextmanager
def cluster(*, verbose: bool = False) -> Iterator[None]:
    """Joins the Ray cluster at RAY_ADDRESS, or starts a cluster on this machine if RAY_ADDRESS is not set.

    Ray sets RAY_ADDRESS in a submitted job. If this function started the cluster, the cluster stops at the end of the
    `with` block. If this function joined the cluster, the cluster continues, but the actors of this run end.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Ray gives its workers the niceness 15, so another program on the machine would get almost all the time of a core.
    niceness = {NICENESS: os.environ.get(NICENESS, "0")}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"} | niceness},
        "log_to_driver": verbose,
        "logging_level": "info" if verbose else "error",
    }
    if address:
        options["address"] = address
    else:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        with _signals_kept():
            ray.init(**options)
        yield
    finally:
        ray.shutdown()


def node_address() -> str:
    """Returns the address at which other nodes of the cluster reach this node."""
    return ray.util.get_node_ip_address()


def is_local_cluster() -> bool:
    """True if `cluster` starts a cluster on this machine; False if it joins a running cluster."""
    return not os.environ.get("RAY_ADDRESS")


def gpus() -> int:
    """Returns the number of GPUs in the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def free_gpus() -> int:
    """Returns the number of GPUs in the cluster that no other program uses."""
    return int(ray.available_resources().get("GPU", 0))
