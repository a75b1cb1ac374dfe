"""Defines types for objects in other processes. rl/actors.py implements these types with Ray.

A caller passes the method itself, for example `remote.start(Policy.update, batch, ...)`, so that the type checker can
compare the arguments and the result with the method's signature.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
Stream = Any
"""A generator that runs in another process. rl.actors.merge_streams reads its values."""


class Future(Protocol[R_co]):
    """A result that may not exist yet."""

    def result(self, patience: float | None = None) -> R_co:
        """Waits for the result.

        Raises the exception of the method, or WorkerDied if the process died or did not answer for `patience` seconds.
        """
        ...


class Remote(Protocol[T]):
    """An object of type T in another process, or in several processes that act as one object."""

    def start(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Starts `method(object, *args)` and returns at once. Calls to the same object run one after the other, in
        order."""
        ...

    @property
    def ranks(self) -> "Sequence[Remote[T]]":
        """One Remote for each process of the object."""
        ...


class StreamingRemote(Remote[T], Protocol[T]):
    """A remote object whose methods may be generators."""

    def stream(self, method: Callable[Concatenate[T, P], Iterator[Any]], *args: P.args, **kwargs: P.kwargs) -> Stream:
        """Starts the generator `method(object, *args)` and returns at once."""
        ...


class Ready(Generic[T]):
    """A Future whose result exists already."""

    def __init__(self, value: T) -> None:
        self.value = value

    def result(self, patience: float | None = None) -> T:
        return self.value


class Local(Generic[T]):
    """A Remote for an object in this process. `start` calls the method directly and returns when the call has ended."""

    def __init__(self, target: T) -> None:
        self.target = target

    @property
    def ranks(self) -> "list[Local[T]]":
        return [self]

    def start(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Ready[R]:
        return Ready(getattr(self.target, method.__name__)(*args, **kwargs))
