"""Makes the plan of a run. Checks everything that can be checked before a process starts. Returns the --dry-run lines.

Tested in tests/runs/test_run.py.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PretrainedConfig

from rewards.endpoint import EndpointSpec
from rewards.running.runner import RewardRunner
from rewards.running.truths import refusals
from rl.config import Config, EndpointOptions, ScorerSpec, Source
from rl.model import hf_folder
from rl.model.config import positions, trained_positions
from rl.record.disk import readable
from rl.record.tracking import check_trackers
from rl.types import Prompt
from rollout.chat import Chat
from rollout.data.errors import BadRow, listing
from rollout.data.order import MixedOrder, Order, PromptOrder
from rollout.data.rows import Rows, read
from rollout.pacore.prompt import SynthesisPrompt, synthesis_template
from stages import stage_class
from stages.base import Stage

FLOAT32 = 4  # bytes
BYTES_PER_TOKEN = 1.5  # estimate for rollouts/: about four characters per token, compressed to a third
MOST_REWARD_WORKERS = 32  # more processes would rarely have work, and each process needs memory for its libraries


@dataclass(frozen=True)
class Plan:
    """A run whose recipe, data, rewards and model files have been checked."""

    config: Config
    model: Path  # local folder of the model that training starts from
    chat: Chat
    train: Sequence[Prompt]
    sources: Sequence[int]  # for each training row, the index of its source in data.train
    order: Order  # order in which the training rows are used
    held_out: Sequence[Prompt]
    skipped: Sequence[BadRow]  # unusable rows, which are left out (data.on_bad_row: skip)
    rewards: RewardRunner  # the processes of these rewards are not started yet
    checkpoint_bytes: int
    left_out: int = 0  # number of training rows that the stage does not select
    conversions: Mapping[str, int] = field(default_factory=dict)  # how many pictures are converted, and how

    @property
    def stage(self) -> type[Stage]:
        """The class of the config's stage."""
        return stage_class(self.config.stage)

    @property
    def most_images(self) -> int:
        """The largest number of pictures in one row."""
        return max((len(p.images) for p in (*self.train, *self.held_out)), default=0)

    def lines(self) -> list[str]:
        """Returns the lines that --dry-run prints."""
        c, last = self.config, self.config.iterations
        evals = 1 + len([i for i in range(1, last + 1) if evaluates(c, i)]) if self.held_out else 0
        pictures = sum(bool(p.images) for p in self.train)
        return [
            f"stage      {c.stage}, {last} iterations",
            f"samples    {c.prompts_per_iteration} prompts x {c.rollouts_per_prompt} rollouts = {c.samples} "
            f"per iteration, {c.samples * last:,} in all",
            f"updates    {c.ppo.minibatches} policy and {c.ppo.critic_minibatches} critic steps per iteration",
            f"train      {len(self.train)} rows, {pictures} with pictures; tasks {', '.join(tasks(self.train))}",
            *self._mix(),
            *self._pictures(),
            *(f"skipped    {line.strip()}" for line in skipped_lines(self.skipped)),
            *self.stage.plan_lines(c, self.left_out),
            f"held out   {len(self.held_out)} rows, evaluated {evals} times",
            f"rewards    {'; '.join(self._reward(task) for task in tasks((*self.train, *self.held_out)))}",
            *(f"judge      {self._judge(name)}" for name in sorted(self.rewards.endpoint_names())),
            f"model      {self.model}",
            f"placement  {c.rollout.workers} vLLM engine(s), {c.learner.ranks} rank(s) each of policy and critic, "
            f"on {device(c)}",
            f"disk       {self._disk()}",
        ]

    def _pictures(self) -> list[str]:
        """Returns one line for each conversion of pictures, and one line if not all pictures were decoded."""
        most = self.config.data.check_pictures
        lines = [f"pictures   {count} {name}" for name, count in sorted(self.conversions.items())]
        note = f"pictures   only {most} pictures were decoded for these checks (data.check_pictures)"
        return lines + ([note] if most and self.most_images else [])

    def _mix(self) -> list[str]:
        """Returns one line for each source if the sources have weights. The line gives the share of prompts from this
        source."""
        sources = self.config.data.train
        total = sum(source.weight or 0 for source in sources)
        return [f"           {100 * (s.weight or 0) / total:.3g}% from {s.path}" for s in sources] if total else []

    def _disk(self) -> str:
        """Returns a text that says how large the run folder can become."""
        c = self.config
        every = c.checkpoint.keep_every
        # "+ 1" counts the checkpoint that is being saved.
        kept = c.checkpoint.keep + 1 + (c.iterations // every if every else 0)
        save = c.rollout.save
        saved = c.samples if save == "all" else 0 if save == "none" else min(save, c.samples)
        rollouts = saved * c.iterations * c.max_sequence_length * BYTES_PER_TOKEN
        size, total = readable(self.checkpoint_bytes), readable(kept * self.checkpoint_bytes)
        return f"up to {kept} checkpoints of {size} = {total}, rollouts at most about {readable(round(rollouts))}"

    def _reward(self, task: str) -> str:
        """Returns the reward of a task as text, for example `chat: 0.8 genrm - citation + 0.2 format_tags`."""
        terms = []
        for reward in self.config.rewards[task]:
            weight = "" if reward.weight == 1 else f"{reward.weight:g} "
            terms.append(weight + " - ".join(scorer.use for scorer in (reward, *reward.penalties)))
        return f"{task}: {' + '.join(terms)}"

    def _judge(self, name: str) -> str:
        endpoint = self.config.endpoints[name]
        return f"{name}: {endpoint.model} {f'at {endpoint.url}' if endpoint.url else 'served by this run'}"


def device(config: Config) -> str:
    """Returns "cpu" or "cuda". The value `auto` means cuda, so that no run uses a CPU by mistake."""
    return "cuda" if config.learner.device == "auto" else config.learner.device


def tasks(prompts: Sequence[Prompt]) -> list[str]:
    return sorted({p.task for p in prompts})


def evaluates(config: Config, iteration: int) -> bool:
    """True if held-out rows are scored after this iteration."""
    return iteration % config.eval.every == 0 or iteration == config.iterations


def saves(config: Config, iteration: int) -> bool:
    """True if a checkpoint is saved after this iteration."""
    return iteration % config.checkpoint.every == 0 or iteration == config.iterations


def make_plan(
    config: Config,
    row_judges: Mapping[str, ScorerSpec] = MappingProxyType({}),
    *,
    begun: bool = False,
    offer_truths: bool = False,
) -> Plan:
    """Checks model, data, rewards and trackers, and returns the plan.

    Args:
        row_judges: the judges of data rows (only for a curation): name -> judge.
        begun: True if the run continues from a checkpoint. The critic of the checkpoint then replaces `model.critic`.
        offer_truths: if True, the reward of every row reads the row's ground truth. Rows whose ground truth is refused
            cannot be used. This starts the reward's processes and takes a while, so only a dry run does it.
    Raises: ValueError or a subclass if a check fails. The message says what is wrong and where.
    """
    check_trackers(config.log.trackers)
    rewards = reward_runner(config, row_judges)
    check_judges(config, rewards)
    if loss := config.ppo.policy_loss:
        from rl.algorithm import verl_bridge

        verl_bridge.policy_loss(loss.verl, loss.params)
    folder = hf_folder.local_folder(config.model.path)
    model = hf_folder.check(folder, yarn=config.model.yarn)
    _check_positions(config, model)
    if config.model.critic is not None and not begun:
        hf_folder.check_critic(config.model.critic, model)
    chat = Chat(
        folder, config.model.chat_template, SynthesisPrompt(synthesis_template(folder, config.synthesis.template))
    )
    check_accept(config)
    train, left_out = _selected(
        config, _rows(config, config.data.train, chat, rewards, trains=True, offer=offer_truths)
    )
    held_out = _rows(config, config.data.eval, chat, rewards, trains=False, offer=offer_truths)
    return Plan(
        config,
        folder,
        chat,
        train.prompts,
        train.sources,
        _order(config, train),
        limited(held_out.prompts, config.data.eval_limit),
        (*train.bad, *held_out.bad),
        rewards,
        checkpoint_bytes(config, folder),
        left_out,
        Counter(train.conversions) + Counter(held_out.conversions),
    )


def reward_runner(config: Config, row_judges: Mapping[str, ScorerSpec] = MappingProxyType({})) -> RewardRunner:
    """Returns the rewards of a recipe, but does not start their processes. Raises ValueError if a reward cannot be
    used."""
    return RewardRunner(
        config.rewards,
        workers=workers(config),
        endpoints={name: EndpointSpec.of(name, options) for name, options in config.endpoints.items()},
        row_judges=row_judges,
    )


def workers(config: Config) -> int:
    """Returns the number of processes that score samples."""
    return config.reward_workers or min(MOST_REWARD_WORKERS, os.cpu_count() or 1)


def _check_positions(config: Config, model: PretrainedConfig) -> None:
    """Raises ValueError if the decoder has too few positions for max_sequence_length."""
    available, trained, needed = positions(model), trained_positions(model), config.max_sequence_length
    if needed > available:
        raise ValueError(
            f"max_sequence_length = {needed} is more than the {available} positions of {config.model.path}; lower it, "
            f"or extend the positions with model.yarn: {math.ceil(needed / trained)}"
        )


def check_accept(config: Config) -> None:
    """Raises ValueError if `accept.by_task` contains a task without rewards."""
    if unknown := [task for task in config.accept.by_task if task not in config.rewards]:
        known = ", ".join(sorted(config.rewards))
        raise ValueError(f"accept.by_task: {unknown[0]!r} is not a task with rewards; tasks with rewards are {known}")


def _selected(config: Config, rows: Rows) -> tuple[Rows, int]:
    """Returns the rows that the stage selects, and the number of rows that it does not select. Raises ValueError if the
    stage selects no row."""
    stage = stage_class(config.stage)
    indices = [n for n, prompt in enumerate(rows.prompts) if stage.selects(prompt, config)]
    if rows.prompts and not indices:
        raise ValueError(f"none of the {len(rows.prompts)} rows {stage.selection}")
    selected = replace(
        rows, prompts=tuple(rows.prompts[n] for n in indices), sources=tuple(rows.sources[n] for n in indices)
    )
    return selected, len(rows.prompts) - len(indices)


def checkpoint_bytes(config: Config, folder: Path) -> int:
    """Returns the size of a checkpoint in bytes: the weights of policy and critic, and the optimizer's two float32
    moments for each trained weight."""
    model = hf_folder.build(hf_folder.read_config(folder))
    frozen = tuple(prefix for name in config.model.freeze for prefix in model.frozen_prefixes[name])
    sizes = {name: tensor.numel() for name, tensor in hf_folder.state(model).items()}
    trained = sum(size for name, size in sizes.items() if not name.startswith(frozen))
    trunk = sum(tensor.numel() for tensor in model.model.parameters())
    itemsize = getattr(torch, config.model.dtype).itemsize
    # If the dtype is smaller than float32, a float32 copy of the weights is saved too.
    kept = 2 * FLOAT32 if itemsize == FLOAT32 else 3 * FLOAT32
    return sum(sizes.values()) * itemsize + trained * kept + trunk * 3 * FLOAT32


def served_here(config: Config, rewards: RewardRunner) -> dict[str, EndpointOptions]:
    """Returns the judges that the run has to serve: name -> options."""
    names = rewards.endpoint_names()
    return {name: options for name, options in config.endpoints.items() if options.url is None and name in names}


def check_judges(config: Config, rewards: RewardRunner) -> None:
    """Raises ValueError if a judge's model folder does not exist. Checks only judges that the run has to serve."""
    for name, judge in served_here(config, rewards).items():
        if Path(judge.model).is_absolute() and not Path(judge.model).is_dir():
            raise ValueError(f"endpoints.{name}.model: there is no folder {judge.model}; give a folder, hub id or url")


def judge_gpus(judge: EndpointOptions) -> int:
    """Returns the number of GPUs that a judge's server needs."""
    return int(judge.serve.get("tensor-parallel-size", 1)) * int(judge.serve.get("pipeline-parallel-size", 1))


def _rows(
    config: Config, sources: Sequence[Source], chat: Chat, rewards: RewardRunner, *, trains: bool, offer: bool
) -> Rows:
    """Reads and checks data rows.

    Raises RowError if there are unusable rows. If the recipe says to skip them (`data.on_bad_row`), RowError is
    raised only if no usable rows remain.

    Args:
        trains: True for training rows, False for held-out rows.
        offer: True if rewards have to read the ground truths.
    """
    stage, data = stage_class(config.stage), config.data

    def problem(prompt: Prompt) -> str | None:
        try:
            why = stage.row_problem(prompt, config, chat, trains=trains)
        except ValueError as error:
            return str(error)
        return why or rewards.problem(prompt)

    rows = read(
        sources,
        columns=data.columns,
        reserved=chat.reserved,
        tasks=config.rewards.keys(),
        problem=problem,
        problems=partial(refusals, config.rewards, workers=workers(config))
        if offer
        else lambda prompts: [None] * len(prompts),
        picture_folders=data.picture_folders,
        check_pictures=data.check_pictures,
        shown=chat.image.shown if chat.image else None,
    )
    return rows.checked(data.on_bad_row)


def skipped_lines(bad: Sequence[BadRow]) -> list[str]:
    """Returns a message about rows that are left out, as a list of lines. The list is empty if there are no such
    rows."""
    first = f"{len(bad)} row(s) cannot be used and are left out (data.on_bad_row: skip):"
    return [first, *listing(bad)] if bad else []


def _order(config: Config, rows: Rows) -> Order:
    """Returns the order of the training rows. The order mixes the sources by weight. Without weights, all rows are used
    equally often."""
    weights = [source.weight for source in config.data.train]
    if None in weights:
        return PromptOrder(rows.prompts, config.seed)
    parts: list[list[Prompt]] = [[] for _ in weights]
    for prompt, number in zip(rows.prompts, rows.sources, strict=True):
        parts[number].append(prompt)
    if empty := [source.path for source, part in zip(config.data.train, parts, strict=True) if not part]:
        raise ValueError(f"{empty[0]} has a weight, but none of its rows can be used")
    return MixedOrder([PromptOrder(part, config.seed) for part in parts], [weight or 0 for weight in weights])


def limited(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Returns the first `limit` prompts of each task, or all prompts if `limit` is None."""
    if limit is None:
        return list(prompts)
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        seen[prompt.task] = seen.get(prompt.task, 0) + 1
        if seen[prompt.task] <= limit:
            result.append(prompt)
    return result
