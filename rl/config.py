"""Every option of a run, declared once, with its default and a sentence on what it does.

Values are frozen, and unknown names are refused. rl.recipe.resolve makes a Config from recipe, profile and
command line.
"Report" below is the STEP3-VL-10B report (arXiv 2601.09668). What it does not state is marked as a reconstruction.

Sizes: prompts_per_iteration x rollouts_per_prompt = samples of an iteration; minibatches = optimizer steps of an
iteration; token_budget = tokens in one forward pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapSerializer, model_validator

Tracker = Literal["tensorboard", "wandb", "mlflow"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rejection = Annotated[str, Field(pattern=r"^(token_k[123]|seq_(sum|mean)_k[123]|seq_max_k[23])$")]
Rate = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _penalties_as_mappings(value: Any) -> Any:
    """A name alone is a penalty with default options."""
    if not isinstance(value, list | tuple):
        return value
    return tuple({"use": item} if isinstance(item, str) else item for item in value)


def _rewards_as_tuple(value: Any) -> Any:
    """A mapping alone is the task's only reward."""
    return (value,) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value


def _dump_rewards(rewards: Any, dump: Callable[[Any], list[Any]]) -> Any:
    """Writes a task's only reward without a list, so that its options have names: rewards.TASK.params."""
    dumped = dump(rewards)
    return dumped[0] if len(dumped) == 1 else dumped


Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_as_tuple)]
Frozen = Annotated[tuple[Literal["encoder", "projector"], ...], AfterValidator(lambda names: tuple(sorted(set(names))))]

# Options that work with these values only so far. Other values are refused.
ONLY_BUILT: Mapping[str, tuple[Any, ...]] = {
    "model.freeze": (("encoder", "projector"),),
    "ppo.kl": (0,),
}
ROUNDING = 1e-9  # weights of 0.7, 0.2 and 0.1 do not add up to 1
SECRETS = ("api_key", "access_token", "secret", "password")


class OptionError(ValueError):
    """A value of the right type that cannot work. `key` is the dotted name of the option."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Options):
    path: str
    """Folder in Hugging Face layout, or hub id, of the model that policy and critic start from."""
    critic: Path | None = None
    """Folder of a critic that an earlier run saved (RUN_DIR/checkpoints/000600/critic), to continue with its weights;
    null: the policy's decoder with a new value head. (The report does not say whether a stage starts from the critic of
    the stage before.)"""
    freeze: Frozen = ("encoder", "projector")
    """Parts that are never trained (report: only the decoder is trained; freezing the projector: reconstruction)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format in which engine and learner compute."""
    chat_template: Path | None = None
    """Jinja file that replaces the model's own chat template."""
    yarn: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Factor by which YaRN extends the decoder's positions, in engine and learner, for sequences longer than it was
    trained on; policies that a run saves keep it. The temperature of attention is not changed (PaCoRe's evaluation:
    2.0)."""


class Source(Options):
    path: str
    """JSONL, JSON or Parquet file, or Hugging Face dataset (folder or hub id). `path:SPLIT` reads another split than
    train."""
    adapter: str | None = None
    """Name of the public data set that the rows come from; they are read by its documented schema. All names are in
    rollout/data/adapters.py. null: the rows have our columns."""
    columns: dict[str, str] = {}
    """Our column name -> the name in this source, in addition to data.columns; a dotted name (extra.answer) is a field
    inside a column."""
    task: str | None = None
    """Task of the rows that have no `task`."""
    weight: Positive | None = None
    """Share of the prompts that come from this source, relative to the other weights. Without weights every row comes
    equally often."""
    limit: Count | None = None
    """Number of rows that are read, from the first on; null: all."""
    streaming: bool = False
    """true: read a data set of the hub without downloading all of it first."""


def _sources_as_mappings(value: Any) -> Any:
    """A path alone is a source with default options."""
    sources = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": source} if isinstance(source, str) else source for source in sources)


def _dump_sources(sources: Any, dump: Callable[[Any], list[dict[str, Any]]]) -> Any:
    """Leaves out options that have their default, and writes a source with no other options as its path."""
    dumped = [{name: value for name, value in item.items() if value not in (None, {}, False)} for item in dump(sources)]
    return [item["path"] if list(item) == ["path"] else item for item in dumped]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources_as_mappings), WrapSerializer(_dump_sources)]


class Data(Options):
    train: Annotated[Sources, Field(min_length=1)]
    """Training rows: JSONL or Parquet file, Hugging Face dataset folder or hub id, or a list of them; each may also be
    a mapping with options of its own."""
    eval: Sources = ()
    """Held-out rows, in the same forms. Without any the run does not evaluate."""
    eval_limit: Count | None = None
    """Number of held-out rows of each task that are evaluated, from the first on; null: all."""
    columns: dict[str, str] = {}
    """Our column name -> the name in the data, for every source without an adapter."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop: if rows cannot be used, list them and stop; skip: leave them out and print a list of them."""


class ScorerSpec(Options):
    """Options that rewards and penalties share."""

    use: str
    """Registered name, `pkg.module:Name` or `file.py:Name` of the reward."""
    params: dict[str, Any] = {}
    """Keyword arguments of the reward."""
    timeout_s: Positive | None = None
    """Seconds that one score may take; null: what the reward declares (default 10; 600 for a reward that asks a
    judge)."""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """MiB that scoring may take in addition to what loading the reward took."""


class PenaltySpec(ScorerSpec):
    magnitude: Fraction = 1.0
    """Share of the reward that a penalty of 1 removes; a magnitude of 1 lowers the reward to its lowest value (report:
    citations zero the reward; the other penalties' magnitudes are unpublished, and 1 is Step 3.5 Flash's)."""


class RewardSpec(ScorerSpec):
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of this reward in the sum of its task's rewards."""
    penalties: Annotated[tuple[PenaltySpec, ...], BeforeValidator(_penalties_as_mappings)] = ()
    """Behaviour penalties that lower this reward: names, or mappings with the options of a reward and a magnitude."""


Rewards = Annotated[
    tuple[RewardSpec, ...], Field(min_length=1), BeforeValidator(_rewards_as_tuple), WrapSerializer(_dump_rewards)
]


class EndpointOptions(Options):
    url: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://judge:8000/v1; null: the run serves `model` itself."""
    model: str
    """Name of the model on that server; without a url: Hugging Face folder or hub id of the model to serve."""
    api_key_env: str | None = None
    """Environment variable that holds the key; keys themselves are never stored."""
    concurrency: Count = 32
    """Largest number of requests under way at a time."""
    timeout_s: Positive = 120.0
    """Seconds that one request may take."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts at a request after HTTP status 429 or 5xx, a timeout or a broken connection."""
    max_wait: Positive = 3600.0
    """Seconds that the run waits, after it has saved, for an endpoint that does not answer; then it stops."""
    images: bool = False
    """true: a prompt's pictures are sent to the model."""
    serve: dict[str, str | int | float | bool] = {}
    """If the run serves the model: arguments of `vllm serve` by their long names, for example {max-model-len: 8192}."""
    structured: bool = True
    """true: the server can restrict a reply to a JSON schema (response_format); false: only the prompt asks for
    JSON."""


Filter = Literal["decontamination", "checkability", "relevance", "difficulty", "synthesis"]


class Decontamination(Options):
    against: Sources = ()
    """Benchmarks, in the forms of data.train; rows that overlap them are dropped. Without any: data.eval."""
    ngram: Count = 64
    """Length of a sequence of words and signs that a row may not share with a benchmark (report: 64-grams; of which
    units it does not say)."""


class Checkability(Options):
    endpoint: str = "checker"
    """Endpoint of the judge (report: GPT-OSS-120B)."""
    passes: Count = 4
    """Times that the judge is asked about each row; the row is kept if all replies say that it is valid (report)."""
    params: dict[str, Any] = {}
    """Further parameters of the row judge `checkable`."""


class Relevance(Options):
    endpoint: str = "rater"
    """Endpoint of a vision-language model (report: an early STEP3-VL-10B)."""
    at_least: Fraction = 0.5
    """Lowest grade, from 0 to 1, with which a row with pictures is kept (reconstruction: the threshold is
    unpublished)."""
    params: dict[str, Any] = {}
    """Further parameters of the row judge `relevant`."""


class Difficulty(Options):
    rollouts: Annotated[int, Field(ge=2)] = 24
    """Responses of the policy to each row (report); the row is kept if some of them are accepted, but not all."""


class SynthesisFilterOptions(Options):
    rollouts: Annotated[int, Field(ge=2)] = 24
    """Responses to each row, with messages shown as in `synthesis`; the row is kept if some of them are accepted, but
    not all (reconstruction: the report does not give the number; the same as for difficulty)."""
    max_sequence_length: Annotated[int, Field(ge=16)] = 65_536
    """Largest number of tokens of problem, messages and response together (report: that of the stage PaCoRe)."""


class CurationOptions(Options):
    filters: tuple[Filter, ...] = ("difficulty",)
    """Filters that `python -m stages.curate` applies, always in the report's order: decontamination, checkability,
    relevance, difficulty, synthesis."""
    rows: Count | None = None
    """Number of rows to curate, spread evenly over data.train; null: all."""
    block: Count = 1024
    """Rows that go through all filters together and make one output file; the engines get all their prompts at once."""
    decontamination: Decontamination = Decontamination()
    """Drops rows that overlap a benchmark."""
    checkability: Checkability = Checkability()
    """A judge says whether question and ground truth are fit for training."""
    relevance: Relevance = Relevance()
    """A vision-language model grades how much question and pictures need each other."""
    difficulty: Difficulty = Difficulty()
    """The policy responds to each row; its final answers become the row's pool of messages."""
    synthesis: SynthesisFilterOptions = SynthesisFilterOptions()
    """The policy responds again to each row, with messages of its pool."""


class Accept(Options):
    """The lowest reward with which a response counts as right, for curation, PaCoRe's messages and metrics, and
    pass@k."""

    least: float = 1.0
    """Lowest reward that counts as right, for tasks that by_task does not name (reconstruction: the highest reward of
    the verifiable tasks)."""
    by_task: dict[str, float] = {}
    """Task -> lowest reward that counts as right, for example where rewards are degrees."""

    def of(self, task: str) -> float:
        """Returns the threshold of a task."""
        return self.by_task.get(task, self.least)

    def takes(self, task: str, reward: float) -> bool:
        """True if a response with this reward counts as right."""
        return reward >= self.of(task) - ROUNDING


class Preference(Options):
    """Options of the stage rlhf, which compares responses with references."""

    verifiable_tasks: tuple[str, ...] = ()
    """Tasks with a ground truth that are mixed in and scored by their own rewards, to preserve reasoning. Rows of all
    other tasks must have a reference and must not have a ground truth (report: uncheckable prompts only)."""


class SynthesisOptions(Options):
    """Messages (final answers of earlier attempts at a problem) and how a prompt shows them."""

    pool: Literal["cached", "online"] = "cached"
    """cached: messages come from the rows (`messages_pool`, which `python -m stages.curate` fills); online: the current
    policy makes new messages for every prompt of an iteration."""
    least_messages: Count = 16
    """Smallest number of messages that a prompt shows (report)."""
    most_messages: Count = 24
    """Largest number of messages that a prompt shows (report)."""
    accuracy_over: Fraction | None = None
    """Only rows whose pool has a larger share of accepted messages than this (the PaCoRe paper: 0); null: all rows."""
    accuracy_under: Fraction | None = None
    """Only rows whose pool has a smaller share of accepted messages than this (the PaCoRe paper: 9/24 in mathematics,
    15/24 in code); null: all rows."""
    template: Path | None = None
    """Jinja file that makes one text of problem and messages; null: pacore.jinja in the model's folder, or without it
    rollout/pacore/pacore.jinja. Policies that a run saves have a copy of the file that is named here."""
    online_rollouts: Count = 24
    """With `pool: online`: attempts at each prompt; their final answers are its pool (report: 24 rollouts)."""
    online_length: Annotated[int, Field(ge=16)] | None = None
    """With `pool: online`: largest number of tokens of a problem and an attempt together; null: max_sequence_length."""

    @model_validator(mode="after")
    def _can_draw(self) -> "SynthesisOptions":
        if self.most_messages < self.least_messages:
            problem = f"= {self.most_messages} is less than least_messages, which is {self.least_messages}"
            raise OptionError("synthesis.most_messages", problem)
        return self


class VerlLoss(Options):
    verl: str
    """Name in verl's registry of policy losses: gspo, cispo, sapo, geo_mean, ..."""
    params: dict[str, float | str] = {}
    """Parameters of the loss by verl's names, e.g. clip_ratio."""


class VerlCorrection(Options):
    """verl's weighting and rejection of tokens or responses by the ratio of learner to engine probability."""

    rollout_is: Literal["token", "sequence"] | None = None
    """Level at which importance weights are formed; null: no weights."""
    rollout_is_threshold: Positive = 2.0
    """Largest importance weight."""
    rollout_rs: Rejection | None = None
    """Statistic that decides which tokens or responses are rejected: token_k1 to 3, seq_sum_k1 to 3, seq_mean_k1 to 3,
    seq_max_k2 or 3."""
    rollout_rs_threshold: Positive | None = None
    """Largest value of that statistic that is not rejected."""

    @model_validator(mode="after")
    def _does_something(self) -> "VerlCorrection":
        key = "ppo.rollout_correction.verl"
        if self.rollout_is is None and self.rollout_rs is None:
            raise OptionError(key, "neither weighs nor rejects; set rollout_is or rollout_rs")
        if (self.rollout_rs is None) != (self.rollout_rs_threshold is None):
            raise OptionError(key, "rollout_rs and rollout_rs_threshold go together; set both or neither")
        return self


class VerlRolloutCorrection(Options):
    verl: VerlCorrection
    """Options of verl's rollout correction."""


class PPO(Options):
    gamma: Fraction = 1.0
    """Discount per response token."""
    lam: Fraction = 1.0
    """GAE lambda; with gamma = lam = 1 the advantage is reward - value at every token."""
    policy_lr: NotNegative = 2e-6
    """Learning rate of the policy after its warm-up; constant from then on."""
    critic_lr: NotNegative = 5e-6
    """Learning rate of the critic after its warm-up; constant from then on."""
    policy_warmup: Annotated[int, Field(ge=0)] = 20
    """Optimizer steps over which policy_lr rises linearly from 0 (reconstruction, from Step 3.5 Flash)."""
    critic_warmup: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps over which critic_lr rises linearly from 0 (reconstruction, from Step 3.5 Flash)."""
    critic_only_iterations: Annotated[int, Field(ge=0)] = 0
    """Number of iterations at the start in which only the critic learns and the policy stays as it is."""
    minibatches: Count
    """Optimizer steps of the policy per iteration; each uses its own share of the samples, once."""
    critic_minibatches: Count
    """Optimizer steps of the critic per iteration."""
    ratio: Literal["none", "clip"] = "none"
    """none: no importance ratio between minibatches, as in the report's text; clip: the report's Eq. 2."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Half-width of the range that `ratio: clip` clips to (reconstruction, from Open-Reasoner-Zero)."""
    tis_cap: Positive | None = 8.0
    """Truncated importance sampling: each token's loss is weighted by its probability in the learner divided by that in
    the engine, at most by this value; no gradient flows through the weight. null: no weights."""
    tis_policy: Literal["current", "before_update"] = "current"
    """Learner policy in that weight. current: the one that is being updated; before_update: the one from before the
    iteration's updates (reconstruction: the report does not say)."""
    truncated: Literal["lowest", "bootstrap"] = "lowest"
    """Reward of a response that was cut at the length limit. lowest: its task's lowest reward; bootstrap: the critic's
    value at the cut (reconstruction: the report is silent)."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and deviation 1 over an iteration's tokens (reconstruction)."""
    kl: NotNegative = 0.0
    """Weight of a penalty on the KL divergence from the starting policy (report's sister papers: none)."""
    entropy: NotNegative = 0.0
    """Weight of an entropy bonus in the loss (report's sister papers: none)."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's decay rates of its two moments, for policy and critic (reconstruction, from Open-Reasoner-Zero)."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay, for policy and critic (reconstruction, from Open-Reasoner-Zero)."""
    max_grad_norm: Positive = 1.0
    """Largest global norm of the gradients of policy and critic; larger gradients are scaled down to it
    (reconstruction)."""
    max_skipped_steps: Count = 3
    """Number of consecutive skipped optimizer steps at which the run stops. A step is skipped if its gradient is not
    finite."""
    policy_loss: VerlLoss | None = None
    """A policy loss of verl instead of ours, such as {verl: gspo}; needs ratio: clip."""
    rollout_correction: VerlRolloutCorrection | None = None
    """verl's correction of the engine-learner mismatch, instead of tis_cap and tis_policy."""


class Partial(Options):
    """Partial rollouts: an iteration ends when enough groups are complete; responses that are cut continue in the next
    one."""

    extra_prompts: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Prompts that are sampled in addition to prompts_per_iteration, as a share of that number, rounded up."""
    chunk_tokens: Count = 1024
    """Tokens by which all responses grow between two checks whether enough groups are complete."""


class RolloutOptions(Options):
    temperature: Positive = 1.0
    """Sampling temperature. There is no top_p or top_k: probability ratios need the whole distribution."""
    workers: Count = 1
    """vLLM engines, each in a process of its own, and on a GPU of its own if there are GPUs."""
    threads: Count = 1
    """CPU threads of each engine, if it runs on the CPU."""
    kv_cache_gib: Count = 4
    """GiB of key-value cache of each engine, if it runs on the CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Fraction of a GPU's memory that its engine takes."""
    patience_s: Positive = 600.0
    """Seconds without a sign of life after which an engine counts as hung and is replaced."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Largest number of iterations by which the engines' weights may lag behind. 0: engines and learner take turns; 1:
    the next iteration's samples are made while this iteration trains, with the weights from before it."""
    partial: Partial | None = None
    """{} or its options: the longest responses are cut and continue in the next iteration, with newer weights, so that
    the others need not wait for them; each token keeps the logprob from the weights that sampled it. null: every
    response is sampled to its end."""
    save: Count | Literal["all", "none"] = "all"
    """Samples per iteration that are written to rollouts/."""
    logprob_check: Count = 8
    """Responses per weight sync whose logprobs the learner recomputes, to check that engine and learner agree."""
    logprob_check_tokens: Count = 16
    """Largest number of tokens of such a response; the check costs as many steps of the engine."""
    logprob_gap_limit: Positive = 0.05
    """Mean |engine - learner| logprob (nats per token) above which the run stops. Sound bfloat16 on a GPU
    shows 0.01 to 0.04, float32 less than 0.0001."""


class Learner(Options):
    ranks: Count = 1
    """Processes that the policy is split over (FSDP2); the critic is split over as many others. Each takes a GPU."""
    token_budget: Count = 32_768
    """Tokens in one forward pass. Changes memory and speed, never the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where policy and critic run; auto: on GPUs, and without any the run does not start."""
    threads: Count | None = None
    """CPU threads of the learner; null: torch decides."""
    activation_checkpointing: bool = False
    """true: keep only each layer's input for the backward pass and compute the rest again: less memory, a third more
    work."""
    patience_s: Positive = 7200.0
    """Seconds that policy or critic may take for one call, for example the update of a whole iteration, before they
    count as hung and all processes are started again from the newest checkpoint."""
    features_mib: Count = 65_536
    """MiB of image features of the frozen encoder that are kept; while there is room, each picture is encoded only
    once. Features that do not fit in Ray's object store are moved to disk."""


class Checkpoint(Options):
    every: Count = 20
    """Iterations between checkpoints; the last iteration always makes one."""
    keep: Count = 2
    """Number of newest checkpoints that stay on disk."""
    keep_every: Count | None = None
    """Checkpoints of iterations that are multiples of this number stay, too."""


class Evaluation(Options):
    every: Count = 100
    """Iterations between greedy evaluations; iteration 0 and the last always have one."""
    batch: Count = 256
    """Held-out prompts that the engines get at a time."""
    sampled_rows: Count | None = None
    """Rows of each task for which a chain's last evaluation samples 16 answers and a synthesis; null: all."""


class Log(Options):
    trackers: Trackers = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: one or several of tensorboard, wandb and mlflow."""
    timeline: bool = False
    """Write timeline.json (Chrome trace format): what every process does and waits for. Open it in
    ui.perfetto.dev."""


class Config(Options):
    """The options of a whole run. The four sizes have no default here, because each stage has its own (stages/)."""

    stage: str
    """Kind of RL: rlvr (verifiable answers), rlhf (preferences) or pacore (synthesis of answers)."""
    iterations: Count
    """Times to sample, score and update."""
    prompts_per_iteration: Count
    """Rows that an iteration samples responses for."""
    rollouts_per_prompt: Count
    """Responses that are sampled for each row."""
    max_sequence_length: Annotated[int, Field(ge=16)]
    """Largest number of tokens of a prompt (its image tokens included) and its response together."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of data order, sampling and initial value head."""
    model: Model
    """The policy to start from."""
    data: Data
    """The rows to train and evaluate on."""
    rewards: Annotated[dict[str, Rewards], Field(min_length=1)]
    """Task -> the reward that scores it, or a list of rewards that are weighted and added. A row's `task` says which
    task it belongs to."""
    reward_workers: Count | None = None
    """Processes that run the rewards that ask no judge; null: one per CPU core, at most 32."""
    max_invalid_fraction: Fraction = 0.1
    """Share of an iteration's samples that may be invalid (a reward or its endpoint failed) before the run stops."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Number of times that processes which died or hung are replaced before the run stops. An engine, or a judge that
    the run serves, is replaced alone. If policy or critic fails, all processes are started again from the
    newest checkpoint."""
    max_start_s: Positive = 3600.0
    """Seconds that a process of the run may take to start before it counts as hung."""
    endpoints: dict[str, EndpointOptions] = {}
    """Name -> the server of a judge, for the rewards that ask it."""
    accept: Accept = Accept()
    """The reward from which a response counts as right."""
    preference: Preference = Preference()
    """Options of the stage rlhf."""
    synthesis: SynthesisOptions = SynthesisOptions()
    """Messages in the stage pacore, in curation's filter synthesis and in evaluation."""
    ppo: PPO
    """The algorithm."""
    rollout: RolloutOptions = RolloutOptions()
    """How responses are sampled."""
    learner: Learner = Learner()
    """How policy and critic are computed, and where."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are made, and which stay on disk."""
    eval: Evaluation = Evaluation()
    """When the policy is measured on held-out rows."""
    log: Log = Log()
    """Trackers and timeline."""
    curate: CurationOptions = CurationOptions()
    """Options of `python -m stages.curate`; a training run does not use them."""

    @property
    def samples(self) -> int:
        """The number of responses of one iteration."""
        return self.prompts_per_iteration * self.rollouts_per_prompt

    def prompt_range(self, iteration: int) -> range:
        """Returns the positions, in the endless sequence of prompts, of the prompts that an iteration begins.

        Iterations count from 1. With partial rollouts the first one begins more prompts than it finishes.
        """
        size, partial = self.prompts_per_iteration, self.rollout.partial
        extra = math.ceil(partial.extra_prompts * size) if partial else 0
        end = extra + iteration * size
        return range(end - size - (extra if iteration == 1 else 0), end)

    @model_validator(mode="after")
    def _can_run(self) -> "Config":
        for problem in (*_unbuilt(self), *_contradictions(self), *_stored_secrets(self)):
            raise problem
        return self


def _unbuilt(config: Config) -> Iterator[OptionError]:
    for key, built in ONLY_BUILT.items():
        if (value := attrgetter(key)(config)) not in built:
            allowed = " or ".join(map(_shown, built))
            yield OptionError(key, f"= {_shown(value)} is not built yet; it can only be {allowed}")


def _contradictions(config: Config) -> Iterator[OptionError]:
    for key in ("minibatches", "critic_minibatches"):
        if (steps := getattr(config.ppo, key)) > config.samples:
            sizes = f"{config.prompts_per_iteration} prompts x {config.rollouts_per_prompt} rollouts"
            yield OptionError(f"ppo.{key}", f"= {steps} is more than the {config.samples} samples ({sizes})")
    for key, sources in (
        ("data.eval", config.data.eval),
        ("curate.decontamination.against", config.curate.decontamination.against),
    ):
        if any(source.weight for source in sources):
            yield OptionError(key, "has a source with a weight; only data.train is drawn from by weight")
    weights = [source.weight for source in config.data.train]
    if None in weights and any(weights):
        yield OptionError("data.train", "gives some of its sources a weight; give all of them one, or none")
    if unknown := [task for task in config.preference.verifiable_tasks if task not in config.rewards]:
        yield OptionError("preference.verifiable_tasks", f"has {unknown[0]!r}, for which there is no reward")
    curation, needed = config.curate, config.synthesis.least_messages
    if {"difficulty", "synthesis"} <= set(curation.filters) and curation.difficulty.rollouts < needed:
        problem = f"= {curation.difficulty.rollouts} is less than synthesis.least_messages, which is {needed}"
        yield OptionError("curate.difficulty.rollouts", problem)
    if (config.synthesis.online_length or 0) > config.max_sequence_length:
        problem = f"= {config.synthesis.online_length} is more than max_sequence_length, {config.max_sequence_length}"
        yield OptionError("synthesis.online_length", problem)
    if config.synthesis.pool == "online" and config.synthesis.online_rollouts < needed:
        problem = f"= {config.synthesis.online_rollouts} is less than synthesis.least_messages, which is {needed}"
        yield OptionError("synthesis.online_rollouts", problem)
    if config.learner.token_budget < config.max_sequence_length:
        problem = f"= {config.learner.token_budget} cannot hold one sequence; max_sequence_length is"
        yield OptionError("learner.token_budget", f"{problem} {config.max_sequence_length}")
    if config.ppo.policy_loss and config.ppo.ratio == "none":
        problem = "of verl needs the ratio to the policy before the update; set ppo.ratio: clip"
        yield OptionError("ppo.policy_loss", problem)
    if config.ppo.policy_loss and config.ppo.clip != PPO.model_fields["clip"].default:
        yield OptionError("ppo.clip", "is not read by verl's losses; set clip_ratio in ppo.policy_loss.params")
    for name, endpoint in config.endpoints.items():
        if endpoint.url is not None and endpoint.serve:
            yield OptionError(f"endpoints.{name}.serve", "is for models that the run serves; leave out the url")


def _stored_secrets(config: Config) -> Iterator[OptionError]:
    """Errors for parameters that hold a secret. recipe.yaml stores every value, so a parameter may only name the
    environment variable of a secret."""
    for task, rewards in config.rewards.items():
        for scorer in (scorer for reward in rewards for scorer in (reward, *reward.penalties)):
            for name in _names(scorer.params):
                if name.lower().endswith(SECRETS):
                    key = f"rewards.{task}.params.{name}"
                    problem = f"would be stored in recipe.yaml; name its environment variable, as in {name}_env"
                    yield OptionError(key, problem)


def _names(params: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in params.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
