"""Time of an iteration as a function of its size, one dimension at a time, plotted to growth.svg.

Tested in tests/benchmarks/test_harness.py (its registration only).
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
PHASES = {"rollout": "rollout", "learner": "critic + policy", "sync": "weights"}  # and their names in the plot
LIMIT = 1.5  # of the ratio


@dataclass(frozen=True)
class Size:
    """Size of an iteration: prompts, rollouts per prompt, tokens of each prompt and of each response."""

    prompts: int = 2
    rollouts: int = 4
    prompt: int = 128
    response: int = 64

    @property
    def tokens(self) -> int:
        """Distinct tokens: a prompt counts once for all its rollouts."""
        return self.prompts * (self.prompt + self.rollouts * self.response)

    def times(self, name: str, factor: int) -> "Size":
        """Returns the size with one dimension multiplied."""
        return replace(self, **{name: factor * getattr(self, name)})


DIMENSIONS = {
    "prompts": "prompts per iteration",
    "rollouts": "rollouts per prompt",
    "prompt": "tokens of a prompt",
    "response": "tokens of a response",
}


class Tokens:
    """A chat with random prompts, of as many tokens as the row says."""

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
    """Seconds per distinct token when one dimension of an iteration is 8 times as large, over those at the base size.

    Real iterations (a vLLM engine, the critic, the policy, new weights; scoring is free) of a decoder with hidden size
    256, at 1, 2, 4 and 8 times each dimension of 2 prompts of 128 tokens x 4 responses of 64. Sizes run in turns;
    seconds are medians and are plotted to growth.svg. `ratio` is the largest of the four dimensions; `more` has all of
    them. The cost of more prompts or rollouts is proportional to their distinct tokens; longer prompts or responses
    also have the quadratic cost of attention. ours_s is the iteration of the base size, other_s the one at 8 times the
    dimension with the largest ratio.
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
    """Starts an engine, a policy and a critic, each in its own process. Yields a function that runs one iteration of a
    size and returns its seconds, in total and by phase."""
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
    stage = STAGES["rlvr"](cast(Any, None))  # RLVR uses no tools
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
    """Copies the model and adds a tokenizer, from which the engine gets the token that ends a response."""
    import shutil

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder, dirs_exist_ok=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0").save_pretrained(folder)
    return str(folder)


def draw(curves: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]) -> None:
    """Plots one panel per dimension. `curves`: dimension -> (distinct tokens, seconds by phase) at every step."""
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
