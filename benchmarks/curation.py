"""Measures the throughput of curation in two ways: all prompts in one queue, and one prompt after another.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered).
"""

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, benchmark, interleaved, max_abs_diff

RECIPE = Path(__file__).parent.parent / "recipes/curate.yaml"
ROWS, REPEATS = 64, 3


@benchmark("curation")
def curation() -> Result:
    """Samples the responses for the difficulty filter, with all rows in one queue (ours_s) and row by row (other_s).

    A real vLLM engine with the CPU profile runs the scale model. It samples 24 responses to each of 64 problems. The
    responses are not scored. Each response has a length on our side and a length on the other side; max_abs_diff is the
    largest difference between these two lengths. If both sides sampled the same tokens, max_abs_diff is 0. The
    difference can be larger, because rounding in the last digits of a probability can change which tokens are sampled.
    """
    from rl.actors import cluster, merge_streams, place
    from rl.recipe.resolve import load
    from rollout.pool import EnginePool, in_order
    from rollout.vllm.client import EngineClient
    from rollout.vllm.engine import Engine
    from stages.curation.run import blocks_of
    from stages.curation.sampling import PolicySampler
    from stages.plan import make_plan

    filters = "curate.filters=[difficulty]"
    config = load(RECIPE, profile="cpu", overrides=[filters, f"curate.rows={ROWS}", f"curate.block={ROWS}"]).config
    plan = make_plan(config)
    (rows,) = blocks_of(plan)
    with cluster():
        engine = place(
            Engine,
            str(plan.model),
            max_sequence_length=config.max_sequence_length,
            dtype=config.model.dtype,
            threads=config.rollout.threads,
        )
        engine.ready()
        limits: dict[str, Any] = {"max_sequence_length": config.max_sequence_length, "temperature": 1.0, "seed": 0}
        pool = EnginePool([EngineClient(engine)], merge_streams, plan.chat, **limits)
        policy = PolicySampler(pool, plan.chat, plan.rewards, 1.0, 0, 0.1)
        numbers, longest = range(config.curate.difficulty.rollouts), config.max_sequence_length
        requests = [policy.requests("difficulty", row.prompt, numbers, longest) for row in rows]
        lengths: dict[str, list[float]] = {}

        def side(name: str) -> float:
            start = time.perf_counter()
            calls = [requests] if name == "ours" else [[group] for group in requests]
            answers = [answer for groups in calls for answer in in_order(pool.complete(groups))]
            lengths[name] = [float(len(answer.response_ids)) for answer in answers]
            return time.perf_counter() - start

        side("ours")  # warm up
        ours_s, other_s = interleaved(lambda: side("ours"), lambda: side("other"), REPEATS)
    more = {"responses": len(lengths["ours"]), "rows": len(rows)}
    return Result(
        ours_s, other_s, other_s / ours_s, max_abs_diff=max_abs_diff(lengths["ours"], lengths["other"]), more=more
    )
