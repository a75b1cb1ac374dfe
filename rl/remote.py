"""Types of objects in other processes. rl/actors.py implements them with Ray.

A method is named by the function itself, for example `remote.start(Policy.update, batch, ...)`, so that the type
checker compares the arguments and the result with the method's signature.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
Stream = Any
"""A generator that runs in another process. rl.actors.merge_streams reads it."""


class Future(Protocol[R_co]):
    """A result that may not exist yet."""

    def result(self, patience: float | None = None) -> R_co:
        """Waits for the result.

        Raises: what the method raised; WorkerDied if the process died or did not answer for `patience` seconds.
        """
        ...


class Remote(Protocol[T]):
    """An object of type T in another process, or in several that act as one."""

    def start(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Begins `method(object, *args)` and returns at once. Calls to one object run in their order."""
        ...

    @property
    def ranks(self) -> "Sequence[Remote[T]]":
        """The object in each of its processes."""
        ...


class StreamingRemote(Remote[T], Protocol[T]):
    """A remote object that has generators as methods."""

    def stream(self, method: Callable[Concatenate[T, P], Iterator[Any]], *args: P.args, **kwargs: P.kwargs) -> Stream:
        """Begins the generator `method(object, *args)` and returns at once."""
        ...


class Ready(Generic[T]):
    """A Future whose result exists."""

    def __init__(self, value: T) -> None:
        self.value = value

    def result(self, patience: float | None = None) -> T:
        return self.value


class Local(Generic[T]):
    """A Remote in this process. Its calls run at once."""

    def __init__(self, target: T) -> None:
        self.target = target

    @property
    def ranks(self) -> "list[Local[T]]":
        return [self]

    def start(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Ready[R]:
        return Ready(getattr(self.target, method.__name__)(*args, **kwargs))
