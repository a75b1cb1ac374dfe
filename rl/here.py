"""An object of this process behind the interface of a remote one (rl.actors.Worker): no Ray, and answers at once."""

from typing import Any


class Done:
    """An answer that is there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self, patience: float | None = None) -> Any:
        return self.value


class Here:
    """Policy, critic or engine in the process that asks it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def start(self, method: str, *args: Any) -> Done:
        return Done(self.call(method, *args))

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.target, method)(*args)
