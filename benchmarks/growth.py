"""Measures how the time of an iteration grows with its size (for example with the number of prompts), and plots the
times to growth.svg.

Tested in tests/benchmarks/test_harness.py (only that the benchmark is registered).
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

from benchmarks.harness import Result, benchmark
from rl.types import Prompt

PLOT = Path(__file__).with_name("growth.svg")
STEPS = (1, 2, 4, 8)
REPEATS = 3
PHASES = {"rollout": "rollout", "learner": "critic + policy", "sync": "weights"}  # phase -> its name in the plot
LIMIT = 1.5  # upper limit of the ratio


@dataclass(frozen=True)
class Size:
    """The size of an iteration: prompts, rollouts per prompt, tokens of a prompt, and tokens of a response."""

    prompts: int = 2
    rollouts: int = 4
    prompt: int = 128
    response: int = 64

    @property
    def tokens(self) -> int:
        """Number of distinct tokens. The tokens of a prompt count only once, although the prompt has several
        rollouts."""
        return self.prompts * (self.prompt + self.rollouts * self.response)

    def times(self, name: str, factor: int) -> "Size":
        """Returns this size with the dimension `name` multiplied by `factor`."""
        return replace(self, **{name: factor * getattr(self, name)})


DIMENSIONS = {
    "prompts": "prompts per iteration",
    "rollouts": "rollouts per prompt",
    "prompt": "tokens of a prompt",
    "response": "tokens of a response",
}


class Tokens:
    """Replaces the chat template. A prompt consists of random tokens. `meta["tokens"]` of the prompt is the number of
    these tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        rng = random.Random(prompt.id)
        return tuple(rng.randrange(1, self.vocabulary) for _ in range(self.length(prompt)))

    def length(self, prompt: Prompt) -> int:
        return prompt.meta["tokens"]

    def text(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return ""


@benchmark("growth")
def growth() -> Result:
    """Measures how the seconds per distinct token grow if one dimension of an iteration becomes 8 times as large.

    Runs real iterations with a vLLM engine, a critic, a policy and the weight update of the engine. Only the scoring is
    simulated, and takes no time. The decoder has a hidden size of 256. The base size is 2 prompts of 128 tokens, with 4
    responses of 64 tokens to each prompt. Each of these four numbers is multiplied by 1, 2, 4 and 8, while the other
    three stay the same. Every repeat runs each size once, and growth.svg shows the median seconds. Each dimension has a
    ratio: the seconds per distinct token with 8 times the base number, divided by the seconds per distinct token at the
    base size. `ratio` is the largest of the four ratios, and `more` has all four. With more prompts or rollouts, the
    cost grows in proportion to the distinct tokens. With longer prompts or responses, the quadratic cost of attention
    is added. ours_s is the time at the base size. other_s is the time when the dimension with the largest ratio is 8
    times as large.
    """
    sizes = {(name, factor): Size().times(name, factor) for name in DIMENSIONS for factor in STEPS}
    took: dict[Size, list[Mapping[str, float]]] = {}
    with processes() as iteration:
        iteration(Size())  # warm up
        for _ in range(REPEATS):
            for size in dict.fromkeys(sizes.values()):
                took.setdefault(size, []).append(iteration(size))
    seconds = {size: {name: median(one[name] for one in runs) for name in runs[0]} for size, runs in took.items()}
    grown = {
        name: (seconds[large]["total"] / large.tokens) / (seconds[Size()]["total"] / Size().tokens)
        for name in DIMENSIONS
        for large in [sizes[name, STEPS[-1]]]
    }
    worst = max(grown, key=grown.__getitem__)
    draw({name: [(sizes[name, step].tokens, seconds[sizes[name, step]]) for step in STEPS] for name in DIMENSIONS})
    return Result(
        seconds[Size()]["total"],
        seconds[sizes[worst, STEPS[-1]]]["total"],
        grown[worst],
        LIMIT,
        more={"goal": f"at most {LIMIT}", **{DIMENSIONS[name]: value for name, value in grown.items()}},
    )


@contextmanager
def processes() -> Iterator[Callable[[Size], dict[str, float]]]:
    """Starts an engine, a policy and a critic, each in its own process.

    Yields: a function that runs one iteration of a given size. The function returns the seconds of each phase. The
    entry "total" is the seconds of the whole iteration.
    """
    from benchmarks.learner import SIZES, model_folder
    from benchmarks.loop import Rewards
    from rl.actors import cluster, merge_streams, place, place_team
    from rl.learner.clients import CriticClient, PolicyClient
    from rl.learner.critic import Critic
    from rl.learner.features import FeatureStore
    from rl.learner.options import LearnerOptions
    from rl.learner.policy import Policy
    from rl.recipe.resolve import load
    from rollout.pool import EnginePool
    from rollout.vllm.client import EngineClient
    from rollout.vllm.engine import Engine
    from stages import STAGES
    from stages.loop import Clock, LoopState, Services, ppo_iteration

    recipe = Path(__file__).parent.parent / "recipes/rlvr.yaml"
    base = load(recipe, profile="cpu", overrides=["max_sequence_length=2048"]).config
    chat: Any = Tokens(SIZES["vocab_size"])
    stage = STAGES["rlvr"](cast(Any, None))  # RLVR does not use its argument `tools`
    numbers = itertools.count(1)

    def iteration(size: Size) -> dict[str, float]:
        longest = size.prompt + size.response
        pool = EnginePool(
            [EngineClient(engine)], merge_streams, chat, max_sequence_length=longest, temperature=1.0, seed=0
        )
        sizes = {"prompts_per_iteration": size.prompts, "rollouts_per_prompt": size.rollouts}
        config = base.model_copy(update=sizes)
        clients = PolicyClient(policy), CriticClient(critic)
        services = Services(config, pool, Rewards(), *clients, FeatureStore([], 1), stage)
        number = next(numbers)
        prompts = [Prompt(f"{number} {i}", "t", (), meta={"tokens": size.prompt}) for i in range(size.prompts)]
        metrics, _ = ppo_iteration(number, prompts, [], services, LoopState(), clock := Clock())
        took = {name.removeprefix("time/"): value for name, value in (metrics | clock.metrics()).items()}
        learner = took["critic"] + took["policy"]
        return {"rollout": took["rollout"], "learner": learner, "sync": took["sync"], "total": took["total"]}

    with TemporaryDirectory() as folder, cluster():
        path = servable(Path(model_folder().name), Path(folder), SIZES["vocab_size"])
        engine = place(Engine, path, max_sequence_length=2048, dtype="float32", kv_cache_gib=2)
        options = LearnerOptions.of(base)
        policy = place_team(Policy.of_rank, path, options, "cpu", count=1)
        critic = place_team(Critic.of_rank, path, options, "cpu", count=1)
        for part in (engine, policy, critic):
            part.ready()
        yield iteration


def servable(model: Path, folder: Path, vocabulary: int) -> str:
    """Copies the model and adds a tokenizer, because the tokenizer tells the engine which token ends a response."""
    import shutil

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder, dirs_exist_ok=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0").save_pretrained(folder)
    return str(folder)


def draw(curves: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]) -> None:
    """Plots one panel per dimension. `curves` maps each dimension to its points. A point is (distinct tokens, phase ->
    seconds)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for panel, (name, points) in zip(panels, curves.items(), strict=True):
        tokens = [x for x, _ in points]
        panel.stackplot(tokens, *([y[phase] for _, y in points] for phase in PHASES), labels=PHASES.values(), alpha=0.7)
        panel.plot(tokens, [y["total"] for _, y in points], "k.-", label="iteration")
        base_tokens, base = points[0]
        panel.plot(tokens, [base["total"] * x / base_tokens for x in tokens], "k:", label="in proportion")
        factors = ", ".join(str(getattr(Size().times(name, step), name)) for step in STEPS)
        panel.set(title=f"{DIMENSIONS[name]}\n{factors}", xlabel="distinct tokens", xlim=(0, None), ylim=(0, None))
    panels[0].set_ylabel("seconds")
    panels[0].legend(fontsize="x-small", loc="upper left")
    figure.savefig(PLOT, metadata={"Date": None})
