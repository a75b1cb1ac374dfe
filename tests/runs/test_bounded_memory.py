"""Tests that the driver of a run needs no more memory and holds no more objects of Ray after 300 iterations.

Ray, the pool of engines, the rewards, the order of the rows, the feature store and the timeline are real. Engines and
policy are scripted, and run in processes of their own.
"""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rewards.running import runner as runner_module
from rewards.running.runner import RewardRunner
from rl.actors import RemoteObject, cluster, merge_streams, place
from rl.learner.clients import EncoderClient
from rl.learner.features import FeatureStore
from rl.record.timeline import Timeline
from rl.types import Completion, Picture, Prompt, Request
from rollout.data.order import MixedOrder, PromptOrder
from rollout.pool import EnginePool
from rollout.vllm.client import EngineClient
from stages.loop import pictures
from tests.support.data_rows import png
from tests.support.engines import Letters
from tests.support.reward_plugins import spec

ITERATIONS, SETTLED = 300, 100  # all iterations; iterations after which memory should grow no more
PER_ITERATION, PER_PROMPT, TOKENS = 4, 4, 500
MIB = 1 << 20
PLUGIN = """
from rewards import reward

@reward("asks")
async def asks(rollout):
    return len(rollout.text) % 2
"""


class ScriptedEngine:
    """Answers each request with TOKENS tokens. The first token is the seed, so all answers differ."""

    def __init__(self) -> None:
        self.step = 0

    def stream(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion]]]:
        for index, request in enumerate(requests):
            ids = (request.seed, *range(TOKENS - 1))
            yield [(index, Completion(request.prompt_ids, ids, (-0.5,) * TOKENS, "stop"))]

    def load(self, weights: Any, step: int) -> None:
        assert weights["w"].shape == (MIB,)
        self.step = step

    def encodings(self) -> int:
        return 0


class ScriptedPolicy:
    """Encodes each picture as 1 MiB of features, and returns 1 MiB of weights."""

    def __init__(self) -> None:
        self._encoded: dict[str, int] = {}

    def encode(self, picture: Picture) -> Any:
        self._encoded[picture.digest] = MIB
        return np.zeros(MIB, np.uint8)

    def encoded(self) -> dict[str, int]:
        sizes, self._encoded = self._encoded, {}
        return sizes

    def weights(self) -> dict[str, Any]:
        return {"w": np.zeros(MIB, np.uint8)}


def objects_of_ray() -> int:
    """Returns the number of Ray's objects to which this process has references."""
    worker: Any = ray._private.worker.global_worker
    return len(worker.core_worker.get_all_reference_counts())


@pytest.mark.slow
def test_memory_and_objects_of_ray_stop_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "REMEMBERED", 500)  # the limit is reached before SETTLED
    (tmp_path / "plugin.py").write_text(PLUGIN)
    rows = [Prompt(str(i), "t", (), (Picture.of(png((i + 1, 1))),)) for i in range(40)]
    order = MixedOrder([PromptOrder(rows[:30], 0), PromptOrder(rows[30:], 0)], [0.7, 0.3])
    memory, objects = list[int](), list[int]()
    chat: Any = Letters()
    with cluster(), RewardRunner({"t": [spec("plugin.py:asks")]}, tmp_path) as rewards:
        engines = [place(ScriptedEngine) for _ in range(2)]
        policy: RemoteObject[Any] = place(ScriptedPolicy)
        handles: list[Any] = [EngineClient(engine) for engine in engines]  # type: ignore[arg-type]
        pool = EnginePool(handles, merge_streams, chat, max_sequence_length=1000, temperature=1.0, seed=0)
        features = FeatureStore([EncoderClient(policy)], limit_mib=8)
        timeline = Timeline(tmp_path / "timeline.json", {"engine": engines[0], "policy": policy})
        for iteration in range(ITERATIONS):
            prompts = order.prompts_at(iteration * PER_ITERATION, PER_ITERATION)
            scoring = rewards.begin(PER_PROMPT)
            for index, rollout in pool.sample(prompts, PER_PROMPT, iteration):
                scoring.add(index, rollout)
            scored = scoring.results()
            assert all(one.invalid is None for one in scored)
            shown = features.of(pictures(one.rollout for one in scored))
            features.trim(shown)
            pool.load(policy.start(ScriptedPolicy.weights), iteration)
            timeline.add("driver", "iteration", 0.0, 1.0)
            timeline.write()
            if iteration % 10 == 9:
                gc.collect()
                memory.append(psutil.Process().memory_info().rss)
                objects.append(objects_of_ray())
    # One iteration's rollouts have over 500 KiB, so 200 iterations that are kept would have 100 MiB.
    settled = SETTLED // 10
    grown = (memory[-1] - memory[settled]) / MIB
    assert grown < 15, f"the driver grew by {grown:.0f} MiB in {ITERATIONS - SETTLED} iterations"
    assert max(objects[settled:]) <= max(objects[:settled]), objects
