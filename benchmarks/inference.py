"""Measures how three things change the speed of PaCoRe in vLLM's server: several problems at the same time, the prefix
cache, and speculation.

Tested in tests/benchmarks/test_harness.py (only that the benchmarks are registered).
"""

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from benchmarks.harness import Result, benchmark, interleaved, max_abs_diff
from rl.types import Prompt
from rollout.generate import Settings, generate, read_problems
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pacore.rounds import PacoreResult, Round
from rollout.pacore.target import ModelTarget

SCALE = Path(__file__).parent.parent / "recipes/scale"
PROBLEMS, TRAJECTORIES, SYNTHESES, REPEATS = 64, 16, 16, 3
SPECULATION = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
FIELDS = {"temperature": 1.0, "max_tokens": 64}


def problems() -> list[Prompt]:
    """Returns PROBLEMS held-out problems. All tasks (for example pointing) have almost the same number of problems."""
    rows = read_problems(str(SCALE / "data/heldout.jsonl"))
    return rows[:: len(rows) // PROBLEMS][:PROBLEMS]


def serving(options: Mapping[str, str | bool] = MappingProxyType({})) -> ModelTarget:
    return ModelTarget(str(SCALE / "model"), max_length=1024, options=options)


def answer_all(
    target: ModelTarget,
    url: str,
    groups: Sequence[Sequence[Prompt]],
    plan: tuple[int, ...] = (TRAJECTORIES,),
    answers: int = 1,
    given: dict[str, tuple[Round, ...]] | None = None,
) -> list[PacoreResult]:
    """Answers the problems of each group in parallel. A group starts when the previous group has ended."""
    results: dict[str, PacoreResult] = {}
    settings = Settings(target.model, plan, answers=answers)

    def on_finished(problem: Prompt, result: PacoreResult | str) -> None:
        if isinstance(result, str):
            raise RuntimeError(f"problem {problem.id} has no answer: {result}")
        results[problem.id] = result

    async def work() -> None:
        async with target.client(url, FIELDS) as client:
            for group in groups:
                synthesis = SynthesisPrompt(SCALE / "pacore.jinja")
                await generate(group, settings, client, synthesis, on_finished, first_rounds=given or {})

    asyncio.run(work())
    return [results[problem.id] for group in groups for problem in group]


@benchmark("inference/parallel")
def parallel() -> Result:
    """Answers 64 problems with PaCoRe (16 trajectories): all at once (ours_s), and one after another (other_s).

    Both sides sample the 16 trajectories of a problem at the same time. Each problem has a token count on our side and
    a token count on the other side; max_abs_diff is the largest difference between these two counts. If both sides
    sampled the same tokens, max_abs_diff is 0. The difference can be larger, because rounding in the last digits of a
    probability can change the tokens.
    """
    target, rows = serving(), problems()
    counted: dict[str, list[float]] = {}

    def side(name: str, url: str) -> float:
        start = time.perf_counter()
        results = answer_all(target, url, [rows] if name == "ours" else [[row] for row in rows])
        counted[name] = [float(result.tokens) for result in results]
        return time.perf_counter() - start

    with target.serve() as url:
        side("ours", url)  # warm up
        ours_s, other_s = interleaved(lambda: side("ours", url), lambda: side("other", url), REPEATS)
    more = {"goal": "ratio at least 3", "problems": len(rows), "tokens": sum(counted["ours"])}
    difference = max_abs_diff(counted["ours"], counted["other"])
    return Result(ours_s, other_s, other_s / ours_s, ceiling=3.0, max_abs_diff=difference, more=more)


@benchmark("inference/prefix_cache")
def prefix_cache() -> Result:
    """Samples 16 trajectories for each long prompt, with (ours_s) and without (other_s) vLLM's prefix cache.

    `hit_rate` is the share of prompt tokens whose keys and values were in the cache. The cache stores only whole blocks
    of 128 tokens. At most 15/16 of the tokens in these blocks can be hits, because the first of the 16 trajectories
    finds nothing in the cache.
    """
    rows = [_long(row) for row in problems() if not row.images][:16]
    cached, plain = serving(), serving({"no-enable-prefix-caching": True})
    rates: list[float] = []

    def side(target: ModelTarget, name: str, url: str) -> float:
        # Every repeat has new questions, which are not yet in the cache.
        numbered = [replace(row, messages=_numbered(row, f"{name} {len(rates)}")) for row in rows]
        before, start = _cache(url), time.perf_counter()
        answer_all(target, url, [numbered], answers=0)
        took = time.perf_counter() - start
        if name == "ours":
            wanted, hit = (after - was for after, was in zip(_cache(url), before, strict=True))
            rates.append(hit / wanted)
        return took

    with cached.serve() as ours, plain.serve() as other:
        ours_s, other_s = interleaved(lambda: side(cached, "ours", ours), lambda: side(plain, "other", other), REPEATS)
    more = {"goal": "hit_rate near 0.94", "hit_rate": fmean(rates), "prompts": len(rows)}
    return Result(ours_s, other_s, other_s / ours_s, more=more)


def _long(row: Prompt) -> Prompt:
    """Returns the row with 60 other questions in front of the row's own question, so that the prompt has several
    hundred tokens."""
    (turn,) = row.messages
    return replace(row, messages=({**turn, "content": "What is 3 + 4 - 5? " * 60 + str(turn["content"])},))


def _numbered(row: Prompt, number: str) -> tuple[dict[str, str], ...]:
    (turn,) = row.messages
    return ({"role": "user", "content": f"{number} {turn['content']}"},)


def _cache(url: str) -> tuple[float, float]:
    """Returns how many prompt tokens were looked up in the prefix cache, and how many of them were found."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as reply:
        text = reply.read().decode()
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    asked, hit = (sum(map(float, re.findall(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.M))) for name in names)
    return asked, hit


@benchmark("inference/ngram")
def ngram() -> Result:
    """Samples syntheses, which quote pooled answers, with (ours_s) and without (other_s) vLLM's n-gram speculation.

    Both sides get the same trajectories and sample 16 syntheses of each problem at temperature 1. Speculation must not
    change the distribution of the sampled tokens. If the mean token counts of both sides differ clearly, speculation
    has changed the distribution.
    """
    rows = problems()
    plain, speculating = serving(), serving({"speculative-config": json.dumps(SPECULATION)})
    counted: dict[str, list[float]] = {}

    def side(target: ModelTarget, name: str, url: str, given: dict[str, tuple[Round, ...]]) -> float:
        start = time.perf_counter()
        results = answer_all(target, url, [rows], (), SYNTHESES, given)
        counted[name] = [float(reply.tokens) for result in results for reply in result.rounds[-1].replies]
        return time.perf_counter() - start

    with speculating.serve() as ours, plain.serve() as other:
        first = answer_all(plain, other, [rows], answers=0)
        given = {row.id: result.rounds for row, result in zip(rows, first, strict=True)}
        for name, target, url in (("ours", speculating, ours), ("other", plain, other)):
            side(target, name, url, given)  # warm up
        ours_s, other_s = interleaved(
            lambda: side(speculating, "ours", ours, given), lambda: side(plain, "other", other, given), REPEATS
        )
    more = {"ours_tokens_mean": fmean(counted["ours"]), "other_tokens_mean": fmean(counted["other"])}
    return Result(ours_s, other_s, other_s / ours_s, more=more)
