"""Ray's one door: plain objects, each in a process of its own with its share of CPUs and GPUs.

An object does not know that it is remote, and the loop does not care: `place` gives a Worker whose `call` answers
like the object itself, and whose `start` answers later.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

ROOT = Path(__file__).parent.parent


class _Holder:
    """What runs in the actor's process: makes the object there and hands calls to it."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.target: Any = None

    def make(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.target = factory(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.target, method)(*args, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        yield from getattr(self.target, method)(*args)


class Later:
    """An answer that may not be there yet. Given as an argument to another `start`, it travels without passing
    through this process."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def result(self) -> Any:
        """Waits; raises what the method raised, or RuntimeError if its process died."""
        return _get(self.reference)


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except RayError as error:
        raise RuntimeError(f"a worker process of the run died: {error}") from error


class Worker:
    """An object in an actor."""

    def __init__(self, actor: Any, made: Later) -> None:
        self._actor, self._made = actor, made

    def ready(self) -> None:
        """Waits until the object exists; raises what its constructor raised."""
        self._made.result()

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
    remote: Any = ray.remote(_Holder)
    actor = remote.options(num_cpus=cpus, num_gpus=gpus).remote(environment or {})
    return Worker(actor, Later(actor.make.remote(factory, args, kwargs)))


def gather(pending: Sequence[Later]) -> list[Any]:
    """All answers, in order; the first failure is raised."""
    return [later.result() for later in pending]


def as_they_come(streams: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """What several generators (of Worker.stream) yield, in the order of its arrival, with each one's index."""
    running: dict[Any, int] = {stream: index for index, stream in enumerate(streams)}
    while running:
        ready: list[Any] = ray.wait(list(running), num_returns=1)[0]
        for stream in ready:
            try:
                reference = next(stream)
            except StopIteration:
                del running[stream]
            else:
                yield running[stream], _get(reference)


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
