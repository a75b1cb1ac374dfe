"""Measures the learner's step in two ways: with shared prompts, and with a copy of the prompt for every rollout.

A step is the forward and backward pass of all rows of a minibatch, without an optimizer step. Our side shares prompts.
Our side is compared with three other sides, which copy the prompt: our packing with copied prompts, padded batches, and
verl. Each comparison is made with four shapes of a minibatch. All sides use the same decoder, rollouts and advantages,
in float32. Each result contains two differences between our side and the other side: the largest difference of a
logprob, and the largest difference of a gradient. Tested in tests/benchmarks/test_harness.py (only that the benchmarks
are registered).
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import CORES, Result, benchmark, interleaved, max_abs_diff
from rl.algorithm.losses import MinibatchSize, policy_gradient_loss
from rl.learner.batch import Group
from rl.learner.packing import PackedRow, pack
from rl.model import hf_folder
from rl.model.attention import Layout, Span
from rl.model.logprobs import token_logprobs
from rl.model.packed import PolicyModel, pairs_per_token
from rl.model.text import TextModel

BUDGET = 8192  # maximum tokens in one forward pass
SPREAD = 0.5  # standard deviation of log(response length)
GOAL, SEQUENCE_GOAL = 0.8, 1.25
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16_384,
}


@dataclass(frozen=True)
class Shape:
    """The shape of a minibatch. `groups` is the number of groups. Each group has one prompt. `prompt` is the number of
    tokens of this prompt, and `responses` is the number of responses to it."""

    groups: int
    prompt: int
    responses: int
    mean: int  # mean number of tokens in a response
    repeats: int
    why: str


SHAPES = {
    "demo": Shape(
        12, 181, 8, 20, repeats=5, why="Small picture, short answers: prompts of 181 tokens, 8 responses of 20 tokens"
    ),
    "rlvr": Shape(
        1, 150, 16, 375, repeats=5, why="The report's lengths / 8: prompt of 150 tokens, 16 responses of 375 tokens"
    ),
    "pacore": Shape(
        1, 1000, 16, 375, repeats=3, why="PaCoRe's lengths / 16: prompt of 1,000 tokens, 16 responses of 375 tokens"
    ),
    "judge": Shape(
        1, 3000, 16, 64, repeats=3, why="Long text, short verdicts: prompt of 3,000 tokens, 16 verdicts of 64 tokens"
    ),
}


@dataclass(frozen=True)
class Work:
    """A minibatch and the decoder that processes it."""

    groups: list[Group]
    advantages: list[Tensor]  # one tensor [response length] per row of the batch
    repeats: int  # number of timed steps of each side
    model: PolicyModel
    config: PretrainedConfig

    @property
    def size(self) -> MinibatchSize:
        return MinibatchSize(sum(map(len, self.advantages)), len(self.advantages))

    def rollouts(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Returns (prompt token ids, response token ids) of every row, in order."""
        return [(group.prompt_ids, response) for group in self.groups for response in group.responses]

    def lengths(self) -> list[int]:
        """Returns the length of every row in tokens: prompt plus response."""
        return [len(prompt) + len(response) for prompt, response in self.rollouts()]


def lengths(shape: Shape, rng: random.Random) -> list[int]:
    """Draws response lengths from a log-normal distribution with the shape's mean. Each length is at least 1."""
    drawn = [exp(rng.gauss(0, SPREAD)) for _ in range(shape.responses)]
    return [max(1, round(x * shape.mean * shape.responses / sum(drawn))) for x in drawn]


@cache
def model_folder() -> TemporaryDirectory[str]:
    """Returns a folder with a random decoder. The folder is deleted when this process ends."""
    torch.manual_seed(0)
    folder = TemporaryDirectory()
    Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)).float().save_pretrained(folder.name)
    return folder


def work(shape: Shape) -> Work:
    """Makes a minibatch of random tokens and advantages, and loads the decoder of `model_folder`."""
    torch.set_num_threads(CORES)
    rng = random.Random(0)
    groups, first = [], 0

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(SIZES["vocab_size"]) for _ in range(count))

    for _ in range(shape.groups):
        responses = tuple(tokens(length) for length in lengths(shape, rng))
        groups.append(Group(tokens(shape.prompt), (), responses, tuple(range(first, first + len(responses)))))
        first += len(responses)
    advantages = [torch.tensor([rng.gauss(0, 1) for _ in response]) for group in groups for response in group.responses]
    model = hf_folder.load(model_folder().name)
    assert isinstance(model, TextModel)
    return Work(groups, advantages, shape.repeats, PolicyModel(model.model, model.lm_head), model.config)


@dataclass(eq=False)
class Side:
    """One implementation of the step. A call runs the step, stores the logprobs, and returns the duration in
    seconds."""

    step: Callable[[], list[Tensor]]  # computes the gradients and returns the logprobs of each row
    gradients: Callable[[], dict[str, Tensor]]  # returns parameter name -> gradient in the last step
    zero: Callable[[], None] = lambda: None  # clears the gradients; does nothing if `step` clears them
    logprobs: Sequence[Tensor] = ()

    def __call__(self) -> float:
        self.zero()
        start = time.perf_counter()
        self.logprobs = self.step()
        return time.perf_counter() - start


def side(made: Work, step: Callable[[], list[Tensor]]) -> Side:
    """Returns a Side that runs `step` on the model of `made`."""

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}

    return Side(step, gradients, lambda: made.model.zero_grad(set_to_none=True))


def backward(made: Work, logprobs: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Backpropagates the policy-gradient loss of `rows`. The loss is divided by the size of the whole minibatch."""
    flat, gains = torch.cat(list(logprobs))[None], torch.cat([made.advantages[row] for row in rows])[None]
    everything = torch.ones(flat.shape, dtype=torch.bool)
    policy_gradient_loss(flat, flat.detach(), gains, everything, size=made.size)[0].backward()


def packed(made: Work, rows: Sequence[PackedRow]) -> Side:
    """Returns the Side of our learner, which processes packed rows."""

    def step() -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for row in rows:
            logprobs, _ = made.model(row, {}, 1.0)
            parts = logprobs.split([int((row.response == i).sum()) for i in range(len(row.batch_rows))])
            backward(made, parts, row.batch_rows.tolist())
            found |= zip(row.batch_rows.tolist(), (part.detach() for part in parts), strict=True)
        return [found[row] for row in sorted(found)]

    return side(made, step)


def unshared(made: Work) -> list[PackedRow]:
    """Packs rollouts without padding. Each rollout is one causal sequence and has its own copy of the prompt."""
    singles = [
        replace(group, responses=(response,), rows=(row,))
        for group in made.groups
        for response, row in zip(group.responses, group.rows, strict=True)
    ]
    rows = pack(singles, BUDGET, None)
    return [replace(row, layout=Layout(tuple(Span(s.length, ()) for s in row.layout.spans))) for row in rows]


def padded(made: Work) -> Side:
    """Returns the Side that computes padded batches with transformers' SDPA. A batch has as many rollouts as BUDGET
    allows."""
    rollouts = made.rollouts()
    longest = max(made.lengths())
    trunk, head = made.model.model, made.model.lm_head
    batches = [range(i, min(i + BUDGET // longest, len(rollouts))) for i in range(0, len(rollouts), BUDGET // longest)]

    def step() -> list[Tensor]:
        found: list[Tensor] = []
        trunk.set_attn_implementation("sdpa")
        for batch in batches:
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            for place, row in enumerate(batch):
                ids[place, : sum(map(len, rollouts[row]))] = torch.tensor(sum(rollouts[row], ()))
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
            parts = []
            for place, row in enumerate(batch):
                prompt, response = rollouts[row]
                before = hidden[place, len(prompt) - 1 : len(prompt) + len(response) - 1]
                parts.append(token_logprobs(before, head.weight, torch.tensor(response), 1.0)[0])
            backward(made, parts, batch)
            found += [part.detach() for part in parts]
        trunk.set_attn_implementation("packed_groups")
        return found

    return side(made, step)


def sequence(made: Work, tokens: int) -> Callable[[], float]:
    """Returns a function that runs the forward and backward pass of one causal sequence, and returns the seconds. The
    function computes the same number of logits as our side."""
    trunk = made.model.model
    ids = torch.randint(0, SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    chosen = slice(tokens - made.size.tokens, tokens)

    def run() -> float:
        made.model.zero_grad(set_to_none=True)
        trunk.set_attn_implementation("sdpa")
        start = time.perf_counter()
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0, chosen]
        token_logprobs(hidden, made.model.lm_head.weight, ids[0, chosen], 1.0)[0].mean().backward()
        took = time.perf_counter() - start
        trunk.set_attn_implementation("packed_groups")
        return took

    return run


def cost(made: Work, tokens: int, pairs: int) -> float:
    """Returns the cost of a forward pass, based on its floating-point operations. The cost is a sum of three parts: the
    matrices of the layers (for all tokens), attention (for all token pairs), and the head (for the response tokens).
    The unit is the cost of one token in the matrices of the layers."""
    per_layer = pairs_per_token(made.config) * 2 * SIZES["num_attention_heads"] * SIZES["head_dim"]  # weights per layer
    head = SIZES["vocab_size"] * SIZES["hidden_size"] / (per_layer * SIZES["num_hidden_layers"])
    return tokens + pairs / pairs_per_token(made.config) + made.size.tokens * head


def compare(made: Work, other: Side, sequences: Sequence[int]) -> Result:
    """Measures the times of our side (shared prompts) and of another side, alternately. Also compares the logprobs and
    the gradients of both sides.

    `sequences` has the lengths of the causal sequences that the other side computes. The ceiling of the ratio is the
    cost of these sequences, divided by the cost of our side, which computes each prompt only once.
    """
    ours = packed(made, pack(made.groups, BUDGET, None))
    ours()  # a warm-up, which also computes the gradients
    gradients = ours.gradients()
    other()
    gradient_diff = max(float((x - gradients[name]).abs().max()) for name, x in other.gradients().items())
    ours_s, other_s = interleaved(ours, other, made.repeats)
    difference = max(max_abs_diff(a.tolist(), b.tolist()) for a, b in zip(ours.logprobs, other.logprobs, strict=True))
    ratio = other_s / ours_s
    others_cost = cost(made, sum(sequences), sum(n * (n + 1) // 2 for n in sequences))
    ceiling = others_cost / cost(made, sum(g.tokens for g in made.groups), sum(g.pairs for g in made.groups))
    more = {"of_ceiling": ratio / ceiling, "goal": f"of_ceiling at least {GOAL}", "cores": CORES}
    return Result(ours_s, other_s, ratio, ceiling, difference, more | {"max_abs_gradient_diff": gradient_diff})


def against_packed(made: Work) -> Result:
    """Compares shared prompts with one copy of the prompt per rollout. Both sides use our packing."""
    found = compare(made, packed(made, unshared(made)), made.lengths())
    rows = pack(made.groups, BUDGET, None)
    plain = sequence(made, sum(len(row.token_ids) for row in rows))
    plain()
    ours_s, plain_s = interleaved(packed(made, rows), plain, made.repeats)
    more = {"sequence_s": plain_s, "over_sequence": ours_s / plain_s, "sequence_goal": f"at most {SEQUENCE_GOAL}"}
    return replace(found, more={**found.more, **more})


def against_padded(made: Work) -> Result:
    """Compares shared prompts with rollouts that are padded to the longest rollout of the minibatch."""
    return compare(made, padded(made), [max(made.lengths())] * len(made.advantages))


def against_verl(made: Work) -> Result:
    """Compares shared prompts with verl's FSDP2 engine, which uses its fastest split for this minibatch.

    The ceiling is the same as in `against_packed`, because verl does not share prompts. verl packs the rollouts or pads
    them, depending on which is faster.
    """
    from benchmarks._verl_engine import VerlEngine, verl_batch

    prompts, responses = zip(*made.rollouts(), strict=True)
    batch = verl_batch(prompts, responses, [gains.tolist() for gains in made.advantages])
    engine = VerlEngine(Path(model_folder().name), BUDGET)
    engine.tune(batch)
    found = compare(made, Side(lambda: engine.step(batch), engine.gradients), made.lengths())
    return replace(found, more={**found.more, "verl_split": str(engine.split)})


AGAINST = {
    "": (against_packed, "one copy of the prompt per rollout"),
    "padded/": (against_padded, "rollouts padded to the longest rollout"),
    "verl/": (against_verl, "verl 0.9.1's FSDP2 engine"),
}


def register(shape: str, prefix: str) -> None:
    """Registers the benchmark learner/<prefix><shape>."""
    run, other = AGAINST[prefix]

    def entry() -> Result:
        return run(work(SHAPES[shape]))

    entry.__doc__ = f"{SHAPES[shape].why}. Compares shared prompts with {other}."
    benchmark(f"learner/{prefix}{shape}")(entry)


for _shape in SHAPES:
    for _prefix in AGAINST:
        register(_shape, _prefix)
