"""Every option of a run, declared once, with its default and a sentence on what it does.

Values are frozen and names are checked; rl.recipe.resolve fills this in from recipe, profile and command line.
"Report" below is the STEP3-VL-10B report (arXiv 2601.09668). What it does not state is marked as a
reconstruction. Sizes have these words and no others: prompts_per_iteration x rollouts_per_prompt = samples of
an iteration; minibatches = optimizer steps of an iteration; token_budget = tokens in one forward pass.
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


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _named_alone(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return tuple({"use": item} if isinstance(item, str) else item for item in value)


def _one_alone(value: Any) -> Any:
    return (value,) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value


def _alone_again(rewards: Any, dump: Callable[[Any], list[Any]]) -> Any:
    """A task's only reward is written without a list, so that its options can be named: rewards.TASK.params."""
    dumped = dump(rewards)
    return dumped[0] if len(dumped) == 1 else dumped


Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_one_or_several)]
Frozen = Annotated[tuple[Literal["encoder", "projector"], ...], AfterValidator(lambda names: tuple(sorted(set(names))))]

# Declared, but so far working with these values only. Any other is refused, never accepted and then ignored.
ONLY_BUILT: Mapping[str, tuple[Any, ...]] = {
    "model.freeze": (("encoder", "projector"),),
    "ppo.kl": (0,),
}
ROUNDING = 1e-9  # weights of 0.7, 0.2 and 0.1 do not add up to 1
SECRETS = ("api_key", "access_token", "secret", "password")


class OptionError(ValueError):
    """A value that is well-typed but cannot work; `key` is its dotted name."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Options):
    path: str
    """Folder in Hugging Face layout, or hub id, that policy and critic start from."""
    critic: Path | None = None
    """Folder of a critic that an earlier run saved (RUN_DIR/checkpoints/000600/critic), to go on with its values; null:
    the policy's decoder with a new value head. (Whether the report carries it from stage to stage is unpublished.)"""
    freeze: Frozen = ("encoder", "projector")
    """Parts that are never trained (report: only the decoder is; freezing the projector: reconstruction)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type that engine and learner compute in."""
    chat_template: Path | None = None
    """Jinja file that replaces the model's own chat template."""
    yarn: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Extend the decoder's positions so many times by YaRN, in engine and learner, for sequences longer than it was
    trained on; policies that a run saves keep it. The temperature of attention stays (PaCoRe's evaluation: 2.0)."""


class Source(Options):
    path: str
    """JSONL, JSON or Parquet file, or Hugging Face dataset (folder or hub id), `path:SPLIT` for another than train."""
    adapter: str | None = None
    """Public data set whose rows these are, read by its documented schema (rollout/data/adapters.py has them all)."""
    columns: dict[str, str] = {}
    """Our column name -> theirs, beyond data.columns; a dotted name (extra.answer) looks inside a column."""
    task: str | None = None
    """Task of the rows that name none."""
    weight: Positive | None = None
    """Its share of the prompts, relative to the other weights. Without weights every row comes equally often."""
    limit: Count | None = None
    """Only the first so many rows."""
    streaming: bool = False
    """Read a hub's data set without downloading all of it first."""


def _sources(value: Any) -> Any:
    """A path alone stands for a source with nothing else said."""
    several = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": one} if isinstance(one, str) else one for one in several)


def _short_sources(sources: Any, dump: Callable[[Any], list[dict[str, Any]]]) -> Any:
    """As a person would write them."""
    said = [{name: value for name, value in one.items() if value not in (None, {}, False)} for one in dump(sources)]
    return [one["path"] if list(one) == ["path"] else one for one in said]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources), WrapSerializer(_short_sources)]


class Data(Options):
    train: Annotated[Sources, Field(min_length=1)]
    """Training rows: JSONL or Parquet file, Hugging Face dataset folder or hub id, or a list of them; each may be a
    mapping with options of its own."""
    eval: Sources = ()
    """Held-out rows, in the same forms; none means that the run never evaluates."""
    eval_limit: Count | None = None
    """Evaluate on the first so many rows of each task only; null takes all."""
    columns: dict[str, str] = {}
    """Our column name -> the name that the data uses, in every source without an adapter."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do if rows cannot be used: list them and stop, or leave them out and say so."""


class ScorerSpec(Options):
    """What rewards and penalties have in common."""

    use: str
    """Registered name, `pkg.module:Name` or `file.py:Name` of the reward."""
    params: dict[str, Any] = {}
    """Keyword arguments of the reward."""
    timeout_s: Positive | None = None
    """Seconds that one score may take; null is what the reward declares (10, those that ask a judge 600)."""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """MiB that scoring may take on top of what loading the reward took."""


class PenaltySpec(ScorerSpec):
    magnitude: Fraction = 1.0
    """Share of the reward that a full offence costs; 1 takes it to its lowest value (report: citations zero the
    reward; the other penalties' magnitudes are unpublished, and 1 is Step 3.5 Flash's)."""


class RewardSpec(ScorerSpec):
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of this reward in its task's sum."""
    penalties: Annotated[tuple[PenaltySpec, ...], BeforeValidator(_named_alone)] = ()
    """Behaviour penalties on this reward: names, or mappings like a reward's with a magnitude."""


Rewards = Annotated[
    tuple[RewardSpec, ...], Field(min_length=1), BeforeValidator(_one_alone), WrapSerializer(_alone_again)
]


class EndpointOptions(Options):
    url: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://judge:8000/v1; null: the run serves `model` itself."""
    model: str
    """Name of the model there; without a url a Hugging Face folder or hub id."""
    api_key_env: str | None = None
    """Environment variable that holds the key; keys themselves are never stored."""
    concurrency: Count = 32
    """Requests under way at a time."""
    timeout_s: Positive = 120.0
    """Seconds that one request may take."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts at a request after 429, 5xx, a timeout or a broken connection."""
    max_wait: Positive = 3600.0
    """Seconds that the run waits for an endpoint that stays away, after saving; then it stops."""
    images: bool = False
    """Whether the model is shown pictures."""
    serve: dict[str, str | int | float | bool] = {}
    """Where the run serves the model: arguments of `vllm serve` by their long names, as in {max-model-len: 8192}."""
    structured: bool = True
    """Whether the server can be held to a JSON schema (response_format); else the prompt only asks for JSON."""


Filter = Literal["decontamination", "checkability", "relevance", "difficulty", "synthesis"]


class Decontamination(Options):
    against: Sources = ()
    """Benchmarks that no row may come from, in the forms of data.train; none: data.eval."""
    ngram: Count = 64
    """Words and signs in a row that may not be shared (report: 64-grams, of what it does not say)."""


class Checkability(Options):
    endpoint: str = "checker"
    """The judge (report: GPT-OSS-120B)."""
    passes: Count = 4
    """Times it is asked about each row; all have to say that the row is valid (report)."""
    params: dict[str, Any] = {}
    """Further parameters of the row judge `checkable`."""


class Relevance(Options):
    endpoint: str = "rater"
    """A vision-language model (report: an early STEP3-VL-10B)."""
    at_least: Fraction = 0.5
    """Grade, of 1, that a row with pictures needs (reconstruction: the threshold is unpublished)."""
    params: dict[str, Any] = {}
    """Further parameters of the row judge `relevant`."""


class Difficulty(Options):
    rollouts: Annotated[int, Field(ge=2)] = 24
    """Responses of the policy to each row (report); a row stays if some are accepted, but not all."""


class SynthesisFilterOptions(Options):
    rollouts: Annotated[int, Field(ge=2)] = 24
    """Responses to each row with messages, as in `synthesis`; it stays if some are accepted, but not all (the report
    does not say how many; as many as for difficulty)."""
    max_sequence_length: Annotated[int, Field(ge=16)] = 65_536
    """Tokens of problem, messages and response together, at most (report: PaCoRe's)."""


class CurationOptions(Options):
    filters: tuple[Filter, ...] = ("difficulty",)
    """Which filters `python -m stages.curate` applies; always in the report's order, which is the one above."""
    rows: Count | None = None
    """Only so many rows, spread evenly over data.train; null: all."""
    block: Count = 1024
    """Rows that go through all filters together and make one output file; the engines get all their prompts at once."""
    decontamination: Decontamination = Decontamination()
    """Rows of benchmarks are left out."""
    checkability: Checkability = Checkability()
    """A judge looks at question and ground truth."""
    relevance: Relevance = Relevance()
    """A vision-language model looks at question and pictures."""
    difficulty: Difficulty = Difficulty()
    """The policy tries each row; what it answered becomes the row's pool of messages."""
    synthesis: SynthesisFilterOptions = SynthesisFilterOptions()
    """The policy tries again with messages of the pool."""


class Accept(Options):
    """From which reward on a response counts as right: for curation, PaCoRe's messages and metrics, and pass@k."""

    least: float = 1.0
    """For tasks that are not named below (reconstruction: the highest reward of the verifiable ones)."""
    by_task: dict[str, float] = {}
    """For single tasks, such as those whose rewards are degrees."""

    def of(self, task: str) -> float:
        """The threshold of a task."""
        return self.by_task.get(task, self.least)

    def takes(self, task: str, reward: float) -> bool:
        """Whether a response with this reward counts as right."""
        return reward >= self.of(task) - ROUNDING


class Preference(Options):
    """What the stage rlhf compares."""

    verifiable_tasks: tuple[str, ...] = ()
    """Tasks whose rows have a ground truth and are mixed in, scored by their own rewards, to preserve reasoning; rows
    of all others need a reference, and may have no ground truth (report: uncheckable prompts only)."""


class SynthesisOptions(Options):
    """Messages, the final answers of earlier attempts at a problem, and how they are shown."""

    pool: Literal["cached", "online"] = "cached"
    """Where messages come from: the rows (`messages_pool`; `python -m stages.curate` fills it), or online: the policy
    as it is makes new ones for every prompt of an iteration."""
    least_messages: Count = 16
    """Fewest messages of a pool that are shown at a time (report)."""
    most_messages: Count = 24
    """Most of them (report)."""
    accuracy_over: Fraction | None = None
    """Only rows whose pool has a larger share of accepted messages (the PaCoRe paper: 0); null: all."""
    accuracy_under: Fraction | None = None
    """Only rows whose pool has a smaller one (the PaCoRe paper: 9/24 in mathematics, 15/24 in code); null: all."""
    template: Path | None = None
    """Jinja file that puts problem and messages into words; null: the one that the model's folder carries
    (pacore.jinja), else rollout/prompts/pacore.jinja. Policies carry what is named here."""
    online_rollouts: Count = 24
    """With `pool: online`, attempts at each prompt, whose final answers are its pool (report: 24 rollouts)."""
    online_length: Annotated[int, Field(ge=16)] | None = None
    """With `pool: online`, tokens of a problem and an attempt together, at most; null: max_sequence_length."""

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
    """Its parameters by verl's names, e.g. clip_ratio."""


class VerlCorrection(Options):
    """verl's weighting and rejection by the ratio of learner to engine probability."""

    rollout_is: Literal["token", "sequence"] | None = None
    """Level at which importance weights are formed; null forms none."""
    rollout_is_threshold: Positive = 2.0
    """Largest importance weight."""
    rollout_rs: Rejection | None = None
    """Statistic by which tokens or responses are rejected: token_k1 to 3, seq_sum_k1 to 3, seq_mean_k1 to 3,
    seq_max_k2 or 3."""
    rollout_rs_threshold: Positive | None = None
    """Largest value of that statistic that is kept."""

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
    """For the first so many iterations only the critic learns and the policy stays as it is."""
    minibatches: Count
    """Optimizer steps of the policy per iteration; each uses its own share of the samples, once."""
    critic_minibatches: Count
    """Optimizer steps of the critic per iteration."""
    ratio: Literal["none", "clip"] = "none"
    """none: no importance ratio between minibatches, as in the report's text; clip: its Eq. 2."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Half-width of the range that `ratio: clip` clips to (reconstruction, from Open-Reasoner-Zero)."""
    tis_cap: Positive | None = 8.0
    """Truncated importance sampling: each token's loss is weighted by its probability in the learner over
    that in the engine, at most this; no gradient flows through the weight. null: no weights."""
    tis_policy: Literal["current", "before_update"] = "current"
    """Learner policy in that weight: the one being updated, or the one from before the iteration's updates
    (reconstruction: the report does not say)."""
    truncated: Literal["lowest", "bootstrap"] = "lowest"
    """What a response cut at the length limit earns: its task's lowest reward, or the critic's value at the
    cut (reconstruction: the report is silent)."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and deviation 1 over an iteration's tokens (reconstruction)."""
    kl: NotNegative = 0.0
    """Weight of a penalty on the KL divergence from the starting policy (report's sister papers: none)."""
    entropy: NotNegative = 0.0
    """Weight of an entropy bonus in the loss (report's sister papers: none)."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's decay rates of its two moments, policy and critic (reconstruction, from Open-Reasoner-Zero)."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay, policy and critic (reconstruction, from Open-Reasoner-Zero)."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm, policy and critic (reconstruction)."""
    max_skipped_steps: Count = 3
    """Optimizer steps in a row that may be left out because their gradient is not finite, before the run stops."""
    policy_loss: VerlLoss | None = None
    """A policy loss of verl instead of ours, such as {verl: gspo}; needs ratio: clip."""
    rollout_correction: VerlRolloutCorrection | None = None
    """verl's correction of the engine-learner mismatch, in place of tis_cap and tis_policy."""


class Partial(Options):
    """Partial rollouts: an iteration ends with enough whole groups, and what is cut goes on in the next one."""

    extra_prompts: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Prompts under way beyond prompts_per_iteration, as a share of them, rounded up."""
    chunk_tokens: Count = 1024
    """Tokens by which all responses grow before it is asked whether enough groups are whole."""


class RolloutOptions(Options):
    temperature: Positive = 1.0
    """Sampling temperature. There is no top_p or top_k: probability ratios need the whole distribution."""
    workers: Count = 1
    """vLLM engines, each in a process (and on a GPU, where there are any) of its own."""
    threads: Count = 1
    """CPU threads of each engine, where it runs on the CPU."""
    kv_cache_gib: Count = 4
    """GiB of key-value cache of each engine, where it runs on the CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Fraction of a GPU's memory that its engine takes."""
    patience_s: Positive = 600.0
    """Seconds without a sign of life after which an engine counts as hung and is replaced."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Iterations by which the weights that sample may lag behind. 0: engines and learner take turns; 1: the next
    iteration's samples are made while this one trains, by the weights from before it."""
    partial: Partial | None = None
    """{} or its options: the longest responses hold nobody up, but are cut and go on in the next iteration, by newer
    weights; each token keeps the logprob of those that sampled it. null: every response is sampled to its end."""
    save: Count | Literal["all", "none"] = "all"
    """Samples written to rollouts/ per iteration."""
    logprob_check: Count = 8
    """Responses per weight sync whose logprobs the learner recomputes, to see that the engine agrees."""
    logprob_check_tokens: Count = 16
    """Tokens of such a response at most: the check costs as many steps of the engine."""
    logprob_gap_limit: Positive = 0.05
    """Mean |engine - learner| logprob (nats per token) above which the run stops. Sound bfloat16 on a GPU
    shows 0.01 to 0.04, float32 less than 0.0001."""


class Learner(Options):
    ranks: Count = 1
    """Processes that the policy is split over (FSDP2), and as many again for the critic; each takes a GPU."""
    token_budget: Count = 32_768
    """Tokens in one forward pass. Changes memory and speed, never the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where policy and critic live; auto takes the GPU if there is one."""
    threads: Count | None = None
    """CPU threads of the learner; null leaves it to torch."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more work."""
    patience_s: Positive = 7200.0
    """Seconds that policy or critic may take for one answer, the update of a whole iteration for example, before they
    count as hung and all is started again from the newest checkpoint."""
    features_mib: Count = 65_536
    """MiB of the frozen encoder's image features that are kept; each picture is encoded once while there is room. Ray
    moves what its object store cannot hold to disk."""


class Checkpoint(Options):
    every: Count = 20
    """Iterations between checkpoints; the last iteration always makes one."""
    keep: Count = 2
    """Newest checkpoints that stay on disk."""
    keep_every: Count | None = None
    """Those of iterations that it divides stay, too."""


class Evaluation(Options):
    every: Count = 100
    """Iterations between greedy evaluations; iteration 0 and the last always have one."""
    batch: Count = 256
    """Held-out prompts that are handed to the engines at a time."""
    sampled_rows: Count | None = None
    """Rows of each task of which a chain's last evaluation samples 16 answers and a synthesis; null: all."""


class Log(Options):
    trackers: Trackers = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: one or several of tensorboard, wandb and mlflow."""
    timeline: bool = False
    """Write timeline.json (Chrome trace format): what every process does and waits for, to look at in
    ui.perfetto.dev."""


class Config(Options):
    """A whole run. The four sizes have no default here: each stage has its own (stages/)."""

    stage: str
    """Kind of RL: rlvr (verifiable answers), rlhf (preferences) or pacore (synthesis of answers)."""
    iterations: Count
    """Times to sample, score and update."""
    prompts_per_iteration: Count
    """Data rows that an iteration samples responses for."""
    rollouts_per_prompt: Count
    """Responses sampled for each of them."""
    max_sequence_length: Annotated[int, Field(ge=16)]
    """Tokens of a prompt (its image tokens included) and its response together, at most."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes data order, sampling and initial value head."""
    model: Model
    """The policy to start from."""
    data: Data
    """What to train and evaluate on."""
    rewards: Annotated[dict[str, Rewards], Field(min_length=1)]
    """Task -> the reward that scores it, or a list of several that are weighted and added; a row's `task` picks."""
    reward_workers: Count | None = None
    """Processes that rewards which compute run in; null: one per CPU core, at most 32."""
    max_invalid_fraction: Fraction = 0.1
    """Share of an iteration's samples that may be invalid (a reward or its endpoint failed) before the run stops."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Times that processes which died or hung are replaced before the run stops: an engine, or a
    judge that the run serves, by itself, policy and critic by starting all again from the newest checkpoint."""
    max_start_s: Positive = 3600.0
    """Seconds that a process of the run may take to start, before it counts as hung."""
    endpoints: dict[str, EndpointOptions] = {}
    """Name -> the server of a judge, for rewards that ask one."""
    accept: Accept = Accept()
    """What counts as right where rewards are degrees."""
    preference: Preference = Preference()
    """Rows of the stage rlhf."""
    synthesis: SynthesisOptions = SynthesisOptions()
    """Messages of the stage pacore, of curation's synthesis and of evaluation."""
    ppo: PPO
    """The algorithm."""
    rollout: RolloutOptions = RolloutOptions()
    """How responses are sampled."""
    learner: Learner = Learner()
    """How policy and critic are computed."""
    checkpoint: Checkpoint = Checkpoint()
    """When the run can be resumed from."""
    eval: Evaluation = Evaluation()
    """When the run is measured on held-out rows."""
    log: Log = Log()
    """Who is told."""
    curate: CurationOptions = CurationOptions()
    """What `python -m stages.curate` keeps; no part of a training run."""

    @property
    def samples(self) -> int:
        """Responses of one iteration."""
        return self.prompts_per_iteration * self.rollouts_per_prompt

    def prompt_range(self, iteration: int) -> range:
        """Which prompts of the endless sequence an iteration begins (from 1); with partial rollouts the first begins
        more than it will finish."""
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
        problem = (
            f"= {curation.difficulty.rollouts} makes no pool of the {needed} that synthesis.least_messages asks for"
        )
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


def _stored_secrets(config: Config) -> Iterator[OptionError]:
    """recipe.yaml keeps every value, so a secret may only be there as the name of an environment variable."""
    for name, endpoint in config.endpoints.items():
        if endpoint.url is not None and endpoint.serve:
            yield OptionError(f"endpoints.{name}.serve", "is for models that the run serves itself; leave out the url")
    for task, rewards in config.rewards.items():
        for scorer in (one for reward in rewards for one in (reward, *reward.penalties)):
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
