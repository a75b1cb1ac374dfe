"""Measures the time of the weight transfer in a real run, and the speed-up if the next iteration is sampled in advance.

Tested in tests/benchmarks/test_harness.py (only that the benchmarks are registered). The loop is tested in
tests/stages/test_loop.py.
"""

import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from benchmarks.harness import Result, benchmark, interleaved
from rl.types import Prompt, Rollout, Scored

ITERATIONS, WARM_UP = 8, 2
SHARE_GOAL, SPEED_GOAL = 0.03, 1.2


@benchmark("sync")
def sync() -> Result:
    """Measures which share of an iteration's time the weight transfer takes (CPU profile). The goal is at most 0.03.

    Runs the shipped recipe rlvr.yaml. ours_s is the time in which the policy returns its weights and the engine loads
    them, as recorded in the run's timeline. other_s is the time of the whole iteration, and ratio is ours_s / other_s.
    Both times are medians over all iterations except the first two. The check after a weight sync is not included.
    """
    from benchmarks.iteration import start

    with TemporaryDirectory() as name:
        run = Path(name, "run")
        start(
            "rl.run", "recipes/rlvr.yaml", "--profile", "cpu", "--output", str(run), f"iterations={ITERATIONS}",
            "data.eval=[]", "log.timeline=true", "log.trackers=[]", "checkpoint.every=1000",
        )  # fmt: skip
        events = json.loads((run / "timeline.json").read_text())
        totals = [json.loads(line).get("time/total", 0.0) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spans = {
        name: [e["dur"] / 1e6 for e in events if e["ph"] == "X" and e["name"] == name] for name in ("weights", "load")
    }
    travel = sum(statistics.median(spans[name][1 + WARM_UP :]) for name in spans)  # the first sync is before training
    whole = statistics.median(totals[1 + WARM_UP :])
    return Result(travel, whole, travel / whole, SHARE_GOAL, more={"goal": f"ratio at most {SHARE_GOAL}"})


class Emulated:
    """A sampler that waits for a given time and returns random responses of 60 tokens to prompts of 150 tokens. The
    check after a weight sync is skipped."""

    def __init__(self, seconds: float, vocabulary: int) -> None:
        self.seconds, self.vocabulary, self.policy_step = seconds, vocabulary, 0

    def sample(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> Iterator[tuple[int, Rollout]]:
        rng = random.Random(iteration)
        made = []
        for prompt in prompts:
            ids = tuple(rng.randrange(self.vocabulary) for _ in range(150))
            for _ in range(per_prompt):
                response = tuple(rng.randrange(self.vocabulary) for _ in range(60))
                # These are the logprobs of a uniform policy. They are close to the logprobs of random weights.
                logprobs = (-math.log(self.vocabulary),) * len(response)
                made.append(Rollout(prompt, "", "stop", ids, response, logprobs, self.policy_step))
        time.sleep(self.seconds)
        yield from enumerate(made)

    def check(self, prompts: Sequence[Prompt], iteration: int) -> list[Rollout]:
        return []

    def greedy(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Rollout]]:
        raise NotImplementedError("this benchmark does not evaluate")

    def load(self, weights: Any, policy_step: int) -> None:
        self.policy_step = policy_step

    def encodings(self) -> int:
        return 0


class Rewards:
    """Scores every rollout with 0 or 1, without a delay."""

    def __init__(self) -> None:
        self.found: dict[int, Scored] = {}

    def begin(self, per_prompt: int) -> "Rewards":
        return Rewards()

    def add(self, place: int, rollout: Rollout) -> None:
        self.found[place] = Scored(rollout, rollout.response_ids[0] % 2)

    def results(self) -> list[Scored]:
        return [self.found[place] for place in sorted(self.found)]


@benchmark("async/one_step_off")
def one_step_off() -> Result:
    """Compares a loop that samples during training (ours_s) with a loop that samples only after training (other_s).

    Generation is emulated by a pause, which takes 80% of an iteration. The loop, the critic and the policy are real and
    run in this process. ours_s is measured with rollout.max_staleness 1 and other_s with 0. Both are mean seconds per
    iteration over the 4 iterations after the first. The best possible ratio is 1 / 0.8 = 1.25; the goal is at least
    1.2.
    """
    from benchmarks.learner import SIZES, model_folder
    from rl.learner.clients import CriticClient, PolicyClient
    from rl.learner.critic import Critic
    from rl.learner.features import FeatureStore
    from rl.learner.options import LearnerOptions
    from rl.learner.policy import Policy
    from rl.recipe.resolve import load
    from rl.remote import Local
    from stages import STAGES
    from stages.loop import Clock, LoopState, Services, ppo_iteration

    count, prompts, group = 4, 2, 8
    recipe = load(
        Path(__file__).parent.parent / "recipes/rlvr.yaml",
        profile="cpu",
        overrides=[f"prompts_per_iteration={prompts}", f"rollouts_per_prompt={group}", "max_sequence_length=4096"],
    ).config
    options = LearnerOptions.of(recipe)
    policy, critic = Policy(model_folder().name, options), Critic(model_folder().name, options)
    asked = [Prompt(str(i), "emulated", ()) for i in range(prompts)]
    pause = 0.0

    class UncheckedPolicy(PolicyClient):
        """A policy client that does not compare logprobs with the engine, because no engine runs."""

        def logprob_gap(self, rollouts: Any, features: Any) -> float:
            return 0.0

    clients = UncheckedPolicy(Local(policy)), CriticClient(Local(critic))

    def per_iteration(staleness: int) -> float:
        options = recipe.rollout.model_copy(update={"max_staleness": staleness})
        config = recipe.model_copy(update={"rollout": options})
        sampler = Emulated(pause, SIZES["vocab_size"])
        stage = STAGES["rlvr"](cast(Any, None))  # RLVR does not use its argument `tools`
        services = Services(config, sampler, Rewards(), *clients, FeatureStore([], 1), stage)
        state, start = LoopState(), 0.0
        for iteration in range(count + 1):
            ppo_iteration(iteration + 1, asked, asked, services, state, Clock())
            start = start or time.perf_counter()  # after iteration 1, whose samples were not made in advance
        took = time.perf_counter() - start
        state.ahead.settle()
        return took / count

    per_iteration(0)  # warm up
    learning = per_iteration(0)
    pause = 4 * learning
    ours_s, other_s = interleaved(lambda: per_iteration(1), lambda: per_iteration(0), 2)
    more = {"goal": f"ratio at least {SPEED_GOAL}", "emulated": "generation", "generation_share": pause / other_s}
    return Result(ours_s, other_s, other_s / ours_s, 1.25, more=more)
