"""Tests that `Local` calls methods at once, and that an engine client passes calls to the engine without changes."""

from typing import Any

from rl.remote import Local
from rl.types import Request
from rollout.vllm.client import EngineClient


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count


class Doubler(Counter):
    def add(self, amount: int) -> int:
        return super().add(2 * amount)


def test_a_local_object_runs_calls_at_once_and_in_their_order() -> None:
    local = Local(Counter())
    first, second = local.start(Counter.add, 2), local.start(Counter.add, 3)
    assert (first.result(), second.result(), local.target.count) == (2, 5, 5)
    assert local.ranks == [local]


def test_a_base_class_method_calls_the_objects_override() -> None:
    assert Local(Doubler()).start(Counter.add, 2).result() == 4


def test_an_engine_client_calls_the_engines_methods_by_their_names() -> None:
    calls = []

    class Recorder:
        """Replaces the process of an engine, and records the calls."""

        def start(self, method: Any, *args: Any) -> Any:
            calls.append((method.__name__, args))

        stream = start

    remote: Any = Recorder()
    client, request = EngineClient(remote), Request((1,), (), 1, 0)
    client.stream([request])
    client.load({"w": 1}, 3)
    client.encodings()
    assert calls == [("stream", ([request],)), ("load", ({"w": 1}, 3)), ("encodings", ())]
