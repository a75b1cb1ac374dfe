"""Declares all options of a run. Each option has a type and a description, and most options have a default value.

A Config cannot be changed after its creation, and unknown option names are refused. rl.recipe.resolve makes a Config
from the recipe, the profile and the command line.

"Report" below means the STEP3-VL-10B report (arXiv 2601.09668). A value that the report does not state is marked as a
reconstruction.

Sizes: an iteration has prompts_per_iteration x rollouts_per_prompt samples. `minibatches` is the number of optimizer
steps in an iteration. `token_budget` is the number of tokens in one forward pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapSerializer, model_validator

from rl.recipe.stored_secrets import secret_options

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
    """Replaces each list item that is only the name of a penalty. The new item is a mapping with this name, so all
    other options of the penalty have their default values."""
    if not isinstance(value, list | tuple):
        return value
    return tuple({"use": item} if isinstance(item, str) else item for item in value)


def _rewards_as_tuple(value: Any) -> Any:
    """Converts a list of rewards to a tuple, and a single reward (a mapping) to a tuple with one item."""
    return (value,) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value


def _dump_rewards(rewards: Any, dump: Callable[[Any], list[Any]]) -> Any:
    """Returns the rewards of a task as a list. If there is only one reward, returns this reward without a list, so that
    its options have names such as rewards.TASK.params."""
    dumped = dump(rewards)
    return dumped[0] if len(dumped) == 1 else dumped


Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_as_tuple)]
Frozen = Annotated[tuple[Literal["encoder", "projector"], ...], AfterValidator(lambda names: tuple(sorted(set(names))))]

# Maps an option to its implemented values. A run with another value is refused.
ONLY_BUILT: Mapping[str, tuple[Any, ...]] = {
    "model.freeze": (("encoder", "projector"),),
    "ppo.kl": (0,),
}
ROUNDING = 1e-9  # tolerance: in floating point, weights of 0.7, 0.2 and 0.1 do not add up to exactly 1


class OptionError(ValueError):
    """Raised if the value of an option has the right type, but the run cannot use this value. `key` is the dotted name
    of the option."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Options):
    path: str
    """The model that the policy and the critic start from: a folder in Hugging Face layout, or a hub id."""
    critic: Path | None = None
    """Folder of a critic that an earlier run saved, such as RUN_DIR/checkpoints/000600/critic. The critic starts with
    the weights in this folder. null: the critic starts from the policy's decoder with a new value head. The report does
    not say whether a stage starts from the critic of the previous stage."""
    freeze: Frozen = ("encoder", "projector")
    """Parts of the model that are not trained. In the report only the decoder is trained; freezing the projector is a
    reconstruction."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the computations in the engines and the learner."""
    chat_template: Path | None = None
    """Jinja file that replaces the model's own chat template."""
    yarn: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Factor by which YaRN multiplies the decoder's number of positions. The decoder can then process longer sequences
    than the sequences of its training. The engines and the learner use this factor, and saved policies contain it. The
    attention temperature does not change. PaCoRe's evaluation uses a factor of 2.0."""


class Source(Options):
    path: str
    """A JSONL, JSON or Parquet file, or a Hugging Face dataset (folder or hub id). The split `train` of a dataset is
    read. The form `path:SPLIT` selects another split."""
    adapter: str | None = None
    """Name of an adapter, which converts the columns of a public dataset to our columns. All adapters are in
    rollout/data/adapters.py. null: the rows already have our columns."""
    columns: dict[str, str] = {}
    """Maps our column names to the column names in this source, in addition to data.columns. A dotted name such as
    extra.answer means the field `answer` inside the column `extra`."""
    task: str | None = None
    """The task of rows that have no value in the column `task`."""
    weight: Positive | None = None
    """Weight of this source. The share of prompts that come from a source is its weight divided by the sum of all
    weights. If no source has a weight, every row is used equally often, no matter which source it comes from."""
    limit: Count | None = None
    """Number of rows that are read from this source. These are the first rows of the source. null: all rows."""
    streaming: bool = False
    """true: rows of a hub dataset are read without downloading the whole dataset first."""
    as_stored: bool = False
    """true: pictures are not turned as their EXIF data say. Use it if boxes and points were measured on the pictures as
    they are stored. false: pictures are turned, so that the model sees them as people do."""


def _sources_as_mappings(value: Any) -> Any:
    """Replaces each source that is only a path. The new source is a mapping with this path, so all other options of the
    source have their default values."""
    sources = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": source} if isinstance(source, str) else source for source in sources)


def _dump_sources(sources: Any, dump: Callable[[Any], list[dict[str, Any]]]) -> Any:
    """Returns the sources without the options that have their default values. If only the path of a source remains,
    the source is returned as this path."""
    dumped = [{name: value for name, value in item.items() if value not in (None, {}, False)} for item in dump(sources)]
    return [item["path"] if list(item) == ["path"] else item for item in dumped]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources_as_mappings), WrapSerializer(_dump_sources)]


class Data(Options):
    train: Annotated[Sources, Field(min_length=1)]
    """Training rows: a JSONL, JSON or Parquet file, a Hugging Face dataset (folder or hub id), or a list of such
    sources. Each source may also be a mapping with its own options."""
    eval: Sources = ()
    """Held-out rows for evaluation, in one of the forms of data.train. Without held-out rows, the run makes no
    evaluations."""
    eval_limit: Count | None = None
    """Maximum number of held-out rows of each task that are evaluated. If a task has more rows, its first rows are
    evaluated. null: all rows."""
    columns: dict[str, str] = {}
    """Maps our column names to the column names in the data. The mapping applies to all sources without an adapter."""
    picture_folders: tuple[str, ...] = ()
    """Folders in which the pictures of rows may be, in addition to the folder of the data file. Rows that name other
    pictures cannot be used. So a data file from somebody else cannot select private pictures."""
    check_pictures: Count | None = None
    """Number of pictures that are decoded before a run starts, for training rows and held-out rows each. null: all
    pictures. The result is remembered, so that only the first start takes long. A picture that cannot be read when it
    is needed makes the samples of its row invalid, and the run goes on."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What the run does with rows that cannot be used. stop: the run lists these rows and stops; skip: the run lists
    these rows and continues without them."""


class ScorerSpec(Options):
    """Options that rewards and penalties have in common."""

    use: str
    """The reward or penalty. The value is a registered name, `pkg.module:Name` or `file.py:Name`."""
    params: dict[str, Any] = {}
    """Keyword arguments of the reward."""
    timeout_s: Positive | None = None
    """Time limit, in seconds, for scoring one response. null: the limit that the reward itself declares. If it declares
    no limit, the limit is 10 s, or 600 s if the reward asks a judge."""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """Memory limit for scoring, in MiB. Memory that is used to load the reward does not count."""


class PenaltySpec(ScorerSpec):
    magnitude: Fraction = 1.0
    """A penalty returns a number from 0 (no offence) to 1 (full offence). The magnitude is the share of the reward that
    a full offence removes. With a magnitude of 1, a full offence lowers the reward to its lowest value. In the report,
    the penalty for citations sets the reward to zero. The report does not give the magnitudes of the other penalties; 1
    is the value of Step 3.5 Flash."""


class RewardSpec(ScorerSpec):
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor by which this reward is multiplied before the rewards of a task are added."""
    penalties: Annotated[tuple[PenaltySpec, ...], BeforeValidator(_penalties_as_mappings)] = ()
    """Behaviour penalties that lower this reward. Each penalty is a name, or a mapping with the options `use`,
    `params`, `timeout_s`, `memory_mb` and `magnitude`."""


Rewards = Annotated[
    tuple[RewardSpec, ...], Field(min_length=1), BeforeValidator(_rewards_as_tuple), WrapSerializer(_dump_rewards)
]


class EndpointOptions(Options):
    url: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://judge:8000/v1; null: the run serves `model` itself."""
    model: str
    """With a url: name of the model on that server. Without a url: Hugging Face folder or hub id of the model that the
    run serves."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key. The key itself is never stored."""
    concurrency: Count = 32
    """Maximum number of concurrent requests."""
    timeout_s: Positive = 120.0
    """Time limit of one request, in seconds."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Maximum number of times that a request is repeated. A request is repeated after HTTP status 429 or 5xx, after a
    timeout and after a broken connection."""
    max_wait: Positive = 3600.0
    """Maximum time, in seconds, that the run waits for an endpoint that does not answer. The run saves a checkpoint
    before it waits. After this time, the run stops."""
    images: bool = False
    """true: the pictures of a prompt are sent to the model."""
    serve: dict[str, str | int | float | bool] = {}
    """Arguments of `vllm serve`, for a model that the run serves. Use the long names of the arguments, for example
    {max-model-len: 8192}."""
    structured: bool = True
    """true: the server supports response_format and restricts each reply to a JSON schema; false: only the prompt asks
    for JSON."""


Filter = Literal["decontamination", "checkability", "relevance", "difficulty", "synthesis"]


class Decontamination(Options):
    against: Sources = ()
    """Benchmarks, in one of the forms of data.train. A training row is dropped if a row of a benchmark has the same
    question, or if both rows have a common n-gram. If this list is empty, the rows of data.eval are the benchmark."""
    ngram: Count = 64
    """Length of an n-gram: a sequence of n words and symbols. A row is dropped if one of its n-grams also occurs in a
    benchmark. The report uses 64-grams, but does not say whether they consist of words, characters or tokens."""


class Checkability(Options):
    endpoint: str = "checker"
    """Name of the judge's endpoint (report: the judge is GPT-OSS-120B)."""
    passes: Count = 4
    """Number of times that the judge is asked about each row. A row is kept if all replies of the judge say that the
    row is valid (report)."""
    params: dict[str, Any] = {}
    """Further parameters of the row judge `checkable`."""


class Relevance(Options):
    endpoint: str = "rater"
    """Name of the endpoint of a vision-language model (report: an early STEP3-VL-10B)."""
    at_least: Fraction = 0.5
    """Lowest grade (0 to 1) at which a row with pictures is kept. The value is a reconstruction: the report does not
    publish the threshold."""
    params: dict[str, Any] = {}
    """Further parameters of the row judge `relevant`."""


class Difficulty(Options):
    rollouts: Annotated[int, Field(ge=2)] = 24
    """Number of responses that the policy gives to each row (report). A row is kept if at least one of its responses is
    accepted and at least one is rejected."""


class SynthesisFilterOptions(Options):
    rollouts: Annotated[int, Field(ge=2)] = 24
    """Number of responses that the policy gives to each row. Each prompt contains messages; the options of `synthesis`
    set the number of messages. A row is kept if at least one of its responses is accepted and at least one is rejected.
    The report does not give the number of responses; the default is the same as for `difficulty` (reconstruction)."""
    max_sequence_length: Annotated[int, Field(ge=16)] = 65_536
    """Maximum total number of tokens of problem, messages and response (report: the limit of the PaCoRe stage)."""


class CurationOptions(Options):
    filters: tuple[Filter, ...] = ("difficulty",)
    """Filters that `python -m stages.curate` applies. They are always applied in the order of the report:
    decontamination, checkability, relevance, difficulty, synthesis."""
    rows: Count | None = None
    """Number of rows of data.train to curate. The rows are evenly spaced over the data; null: all rows."""
    block: Count = 1024
    """Number of rows in a block. The rows of a block go through all filters together and are written to one file,
    before the next block starts. The engines get all prompts of a block at once."""
    decontamination: Decontamination = Decontamination()
    """Options of the filter that drops rows which overlap a benchmark."""
    checkability: Checkability = Checkability()
    """Options of the filter in which a judge says whether question and ground truth are suitable for training."""
    relevance: Relevance = Relevance()
    """Options of the filter in which a vision-language model grades how closely question and pictures are related."""
    difficulty: Difficulty = Difficulty()
    """Options of the filter in which the policy responds to each row. The final answers of these responses become the
    row's pool of messages."""
    synthesis: SynthesisFilterOptions = SynthesisFilterOptions()
    """Options of the filter in which the policy responds to each row again, with messages from the row's pool in the
    prompt."""


class Accept(Options):
    """The lowest reward at which a response counts as right. Curation, PaCoRe (messages and metrics) and pass@k use
    this threshold."""

    least: float = 1.0
    """Lowest reward that counts as right, for tasks that are not in by_task. The default is 1, the reward of a fully
    right response in the verifiable tasks (reconstruction)."""
    by_task: dict[str, float] = {}
    """Maps a task to the lowest reward that counts as right in this task. This is useful for a task that also gives
    rewards between 0 and 1, such as 0.5."""

    def of(self, task: str) -> float:
        """Returns the threshold of a task."""
        return self.by_task.get(task, self.least)

    def takes(self, task: str, reward: float) -> bool:
        """True if a response with this reward counts as right."""
        return reward >= self.of(task) - ROUNDING


class Preference(Options):
    """Options of the stage rlhf, which compares responses with references."""

    verifiable_tasks: tuple[str, ...] = ()
    """Tasks whose rows have a ground truth. The stage also trains on these tasks, so that the policy keeps its
    reasoning ability. Their responses are scored by the rewards that the recipe gives to these tasks. Rows of all other
    tasks must have a reference and must not have a ground truth (report: only prompts that cannot be checked)."""


class SynthesisOptions(Options):
    """Options of messages and of the prompts that contain them. A message is the final answer of an earlier attempt at
    the same problem."""

    pool: Literal["cached", "online"] = "cached"
    """Source of the messages. cached: they come from the column `messages_pool` of the rows, which
    `python -m stages.curate` fills; online: the current policy makes new messages for every prompt of an iteration."""
    least_messages: Count = 16
    """Minimum number of messages in a prompt (report)."""
    most_messages: Count = 24
    """Maximum number of messages in a prompt (report)."""
    accuracy_over: Fraction | None = None
    """Lower limit of the share of accepted messages in a row's pool. A row is used only if its share is above this
    value (PaCoRe paper: 0). null: no lower limit."""
    accuracy_under: Fraction | None = None
    """Upper limit of the share of accepted messages in a row's pool. A row is used only if its share is below this
    value (PaCoRe paper: 9/24 in mathematics, 15/24 in code). null: no upper limit."""
    template: Path | None = None
    """Jinja file that combines problem and messages into one text. Saved policies contain a copy of this file. null:
    the file pacore.jinja in the model's folder is used. If the model's folder has no pacore.jinja, the file
    rollout/pacore/pacore.jinja is used."""
    online_rollouts: Count = 24
    """With `pool: online`: number of attempts at each prompt. The messages of the prompt are drawn from the final
    answers of these attempts (report: 24 rollouts)."""
    online_length: Annotated[int, Field(ge=16)] | None = None
    """With `pool: online`: maximum total number of tokens of a problem and one attempt; null: max_sequence_length."""

    @model_validator(mode="after")
    def _can_draw(self) -> "SynthesisOptions":
        if self.most_messages < self.least_messages:
            problem = f"= {self.most_messages} is less than least_messages, which is {self.least_messages}"
            raise OptionError("synthesis.most_messages", problem)
        return self


class VerlLoss(Options):
    verl: str
    """Name of a policy loss in verl's registry: gspo, cispo, sapo, geo_mean, ..."""
    params: dict[str, float | str] = {}
    """Parameters of the loss, by their names in verl, e.g. clip_ratio."""


class VerlCorrection(Options):
    """Options of verl's rollout correction. The correction computes a ratio for each token or response: the probability
    in the learner divided by the probability in the engine. The ratio decides how much weight the token or response
    has, and whether the token or response is rejected."""

    rollout_is: Literal["token", "sequence"] | None = None
    """token: each token has its own importance weight; sequence: all tokens of a response have the same weight; null:
    no weights."""
    rollout_is_threshold: Positive = 2.0
    """Upper limit of the importance weights."""
    rollout_rs: Rejection | None = None
    """Name of the statistic that decides which tokens or responses are rejected: token_k1 to token_k3, seq_sum_k1 to
    seq_sum_k3, seq_mean_k1 to seq_mean_k3, seq_max_k2 or seq_max_k3. null: nothing is rejected."""
    rollout_rs_threshold: Positive | None = None
    """Upper limit of the statistic in rollout_rs. Tokens or responses above this limit are rejected."""

    @model_validator(mode="after")
    def _does_something(self) -> "VerlCorrection":
        key = "ppo.rollout_correction.verl"
        if self.rollout_is is None and self.rollout_rs is None:
            raise OptionError(key, "has no weights and no rejection; set rollout_is or rollout_rs")
        if (self.rollout_rs is None) != (self.rollout_rs_threshold is None):
            raise OptionError(key, "has only one of rollout_rs and rollout_rs_threshold; set both or none")
        return self


class VerlRolloutCorrection(Options):
    verl: VerlCorrection
    """Options of verl's rollout correction."""


class PPO(Options):
    gamma: Fraction = 1.0
    """Discount factor per response token."""
    lam: Fraction = 1.0
    """Lambda of GAE. With gamma = lam = 1 the advantage of every token is reward - value."""
    policy_lr: NotNegative = 2e-6
    """Learning rate of the policy. It is constant after the warm-up."""
    critic_lr: NotNegative = 5e-6
    """Learning rate of the critic. It is constant after the warm-up."""
    policy_warmup: Annotated[int, Field(ge=0)] = 20
    """Number of optimizer steps in which the learning rate rises linearly from 0 to policy_lr (reconstruction, from
    Step 3.5 Flash)."""
    critic_warmup: Annotated[int, Field(ge=0)] = 50
    """Number of optimizer steps in which the learning rate rises linearly from 0 to critic_lr (reconstruction, from
    Step 3.5 Flash)."""
    critic_only_iterations: Annotated[int, Field(ge=0)] = 0
    """Number of iterations, at the start of the run, in which only the critic is trained. The policy does not change in
    these iterations."""
    minibatches: Count
    """Number of optimizer steps of the policy per iteration. The samples are divided among the steps, and each sample
    is used in one step."""
    critic_minibatches: Count
    """Number of optimizer steps of the critic per iteration."""
    ratio: Literal["none", "clip"] = "none"
    """The importance ratio: the probability of a token under the current policy, divided by its probability under the
    policy before the update. none: the loss has no ratio, as in the text of the report; clip: the loss has the clipped
    ratio of the report's Eq. 2."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """With `ratio: clip`, the ratio is clipped to the range from 1 - clip to 1 + clip (reconstruction, from
    Open-Reasoner-Zero)."""
    tis_cap: Positive | None = 8.0
    """Upper limit of the weights in truncated importance sampling. The loss of each token is multiplied by a weight:
    the token's probability in the learner divided by its probability in the engine. No gradient flows through the
    weight. null: no weights."""
    tis_policy: Literal["current", "before_update"] = "current"
    """A weight of tis_cap contains the token's probability in the learner. This option says which policy gives this
    probability. current: the policy that is being updated; before_update: the policy before the updates of the
    iteration (reconstruction: the report does not say which)."""
    truncated: Literal["lowest", "bootstrap"] = "lowest"
    """The reward that a response gets if it was cut at the length limit. lowest: the lowest reward of its task;
    bootstrap: the critic's value at the cut (reconstruction: the report does not say)."""
    normalize_advantages: bool = True
    """true: advantages are shifted and scaled to mean 0 and standard deviation 1 over all tokens of an iteration
    (reconstruction)."""
    kl: NotNegative = 0.0
    """Weight of a penalty on the KL divergence from the starting policy. Related papers of the report's authors use no
    such penalty."""
    entropy: NotNegative = 0.0
    """Weight of an entropy bonus in the loss. Related papers of the report's authors use no such bonus."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of AdamW's two moment estimates, for policy and critic (reconstruction, from Open-Reasoner-Zero)."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW, for policy and critic (reconstruction, from Open-Reasoner-Zero)."""
    max_grad_norm: Positive = 1.0
    """Maximum global norm of a gradient, for policy and critic. A larger gradient is scaled down to this norm
    (reconstruction)."""
    max_skipped_steps: Count = 3
    """The run stops after this number of consecutive skipped optimizer steps. A step is skipped if its gradient is not
    finite."""
    policy_loss: VerlLoss | None = None
    """Policy loss of verl, such as {verl: gspo}, that is used instead of our own loss. It needs `ratio: clip`."""
    rollout_correction: VerlRolloutCorrection | None = None
    """verl's correction of the mismatch between engine and learner. It is used instead of tis_cap and tis_policy."""


class Partial(Options):
    """Options of partial rollouts. A group is all responses to one prompt. An iteration ends when enough groups are
    complete; unfinished responses continue in the next iteration."""

    extra_prompts: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Responses are sampled for additional prompts. The number of additional prompts is this value multiplied by
    prompts_per_iteration, rounded up. Example: 0.25 with 64 prompts per iteration means 16 additional prompts."""
    chunk_tokens: Count = 1024
    """Number of new tokens that each unfinished response gets before the run checks again whether enough groups are
    complete."""


class RolloutOptions(Options):
    temperature: Positive = 1.0
    """Sampling temperature. There are no options top_p and top_k, because probability ratios need the whole
    distribution."""
    workers: Count = 1
    """Number of vLLM engines. Each engine has its own process, and its own GPU if there are GPUs."""
    threads: Count = 1
    """Number of CPU threads of each engine, if the engines run on the CPU."""
    kv_cache_gib: Count = 4
    """Size of each engine's key-value cache in GiB, if the engines run on the CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Fraction of a GPU's memory that an engine on this GPU may use."""
    patience_s: Positive = 600.0
    """If an engine gives no sign of life for this number of seconds, it counts as hung and is replaced."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Number of iterations by which the engines' weights may be older than the learner's weights. 0: engines and
    learner take turns. 1: while one iteration trains, the engines make the samples of the next iteration with the older
    weights."""
    partial: Partial | None = None
    """Options of partial rollouts; {} means the default options. With partial rollouts, the longest responses are cut
    and continue in the next iteration with newer weights, so that an iteration does not wait for its longest responses.
    Each token keeps the logprob that it had when it was sampled. null: every response is sampled to its end."""
    save: Count | Literal["all", "none"] = "all"
    """Number of samples per iteration that are written to rollouts/. The values `all` and `none` are allowed too."""
    logprob_check: Count = 8
    """Number of responses that the engines sample after each weight sync, as a check. The learner computes the logprobs
    of these responses too. The logprobs of engines and learner must agree."""
    logprob_check_tokens: Count = 16
    """Maximum number of tokens of a response that is sampled for logprob_check. The engines need one step for each
    token."""
    logprob_gap_limit: Positive = 0.05
    """The run stops if the mean absolute difference between the engine's and the learner's logprobs (nats per token) is
    above this value. Without an error in engine or learner, the mean is 0.01 to 0.04 in bfloat16 on a GPU, and less
    than 0.0001 in float32."""


class Learner(Options):
    ranks: Count = 1
    """The policy is split over this number of processes (FSDP2). The critic is split over the same number of further
    processes. Each process takes one GPU."""
    token_budget: Count = 32_768
    """Maximum number of tokens in one forward pass. This option changes memory use and speed, but not the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of policy and critic. auto: GPUs; if there are no GPUs, the run does not start."""
    threads: Count | None = None
    """Number of CPU threads of the learner; null: torch decides."""
    activation_checkpointing: bool = False
    """true: for the backward pass, only the input of each layer is kept, and all other activations are computed a
    second time. This needs less memory, but a third more computation."""
    patience_s: Positive = 7200.0
    """Time limit, in seconds, of one call to policy or critic, for example the update of a whole iteration. A process
    that takes longer counts as hung, and all processes are started again from the newest checkpoint."""
    features_mib: Count = 65_536
    """Size in MiB of the cache for image features of the frozen encoder. While the cache has room, each picture is
    encoded only once. If Ray's object store has no room for the features, Ray moves them to disk."""


class Checkpoint(Options):
    every: Count = 20
    """Number of iterations between two checkpoints. The last iteration always makes a checkpoint."""
    keep: Count = 2
    """Number of checkpoints that stay on disk. These are always the newest checkpoints."""
    keep_every: Count | None = None
    """In addition, a checkpoint stays on disk if its iteration is a multiple of this number. null: only the newest
    checkpoints stay."""


class Evaluation(Options):
    every: Count = 100
    """Number of iterations between two greedy evaluations. Iteration 0 and the last iteration always have an
    evaluation."""
    batch: Count = 256
    """Number of held-out prompts that are sent to the engines at a time."""
    sampled_rows: Count | None = None
    """Number of rows of each task in the evaluation at the end of a chain; null: all rows. For each row, this
    evaluation samples 16 answers and one synthesis."""


class Log(Options):
    trackers: Trackers = ("tensorboard",)
    """Trackers that get the metrics: one or several of tensorboard, wandb and mlflow. All metrics are also written to
    metrics.jsonl."""
    timeline: bool = False
    """true: the run writes timeline.json (Chrome trace format). The file shows when each process works, and what it
    waits for. Open the file in ui.perfetto.dev."""


class Config(Options):
    """The options of a whole run.

    The options from `iterations` to `max_sequence_length` have no default here, because each stage in stages/ has its
    own defaults for them.
    """

    stage: str
    """Kind of RL: rlvr (verifiable answers), rlhf (preferences) or pacore (synthesis of answers)."""
    iterations: Count
    """Number of iterations. Each iteration samples responses, scores them and updates the weights."""
    prompts_per_iteration: Count
    """Number of rows that an iteration uses as prompts."""
    rollouts_per_prompt: Count
    """Number of responses that are sampled for each row."""
    max_sequence_length: Annotated[int, Field(ge=16)]
    """Maximum total number of tokens of a prompt (with image tokens) and a response."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed for the order of the data, for sampling and for the initial value head."""
    model: Model
    """The model that the run starts from."""
    data: Data
    """The rows to train and evaluate on."""
    rewards: Annotated[dict[str, Rewards], Field(min_length=1)]
    """Maps each task to the reward that scores its responses, or to a list of rewards whose weighted sum is used. The
    column `task` of a row holds the name of the task."""
    reward_workers: Count | None = None
    """Number of processes for rewards that do not ask a judge; null: one process per CPU core, at most 32."""
    max_invalid_fraction: Fraction = 0.1
    """The run stops if the share of invalid samples in an iteration is larger than this value. A sample is invalid if a
    reward or its endpoint failed."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Maximum number of times that a run replaces processes which died or hung. After that, the next failure stops the
    run. If an engine fails, or if a judge that the run serves fails, only the failed process is replaced. If the policy
    or the critic fails, all processes are started again from the newest checkpoint."""
    max_start_s: Positive = 3600.0
    """Time limit, in seconds, for the start of a process. A process that takes longer counts as hung."""
    endpoints: dict[str, EndpointOptions] = {}
    """Maps a name to the server of a judge. A reward refers to its judge by this name."""
    accept: Accept = Accept()
    """The lowest reward at which a response counts as right."""
    preference: Preference = Preference()
    """Options of the stage rlhf."""
    synthesis: SynthesisOptions = SynthesisOptions()
    """Options of prompts with messages, for the stage pacore, the curation filter `synthesis` and evaluation."""
    ppo: PPO
    """Options of the PPO algorithm."""
    rollout: RolloutOptions = RolloutOptions()
    """How responses are sampled."""
    learner: Learner = Learner()
    """How and on which devices policy and critic are computed."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are made, and which checkpoints stay on disk."""
    eval: Evaluation = Evaluation()
    """When the policy is measured on held-out rows."""
    log: Log = Log()
    """Options of trackers and timeline."""
    curate: CurationOptions = CurationOptions()
    """Options of `python -m stages.curate`. A training run does not use these options."""

    @property
    def samples(self) -> int:
        """The number of responses of one iteration."""
        return self.prompts_per_iteration * self.rollouts_per_prompt

    def prompt_range(self, iteration: int) -> range:
        """Returns the positions of the prompts for which an iteration starts to sample responses. A position is an
        index into the endless sequence of prompts. The first iteration is iteration 1.

        With partial rollouts, the first iteration starts more prompts than it finishes.
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
            yield OptionError(key, f"= {_shown(value)} is not implemented yet; it can only be {allowed}")


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
            yield OptionError(key, "has a source with a weight; only sources of data.train may have a weight")
    weights = [source.weight for source in config.data.train]
    if None in weights and any(weights):
        yield OptionError("data.train", "gives some of its sources a weight; give all sources a weight, or none")
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
        problem = "is a loss of verl, which needs the ratio to the policy before the update; set ppo.ratio: clip"
        yield OptionError("ppo.policy_loss", problem)
    if config.ppo.policy_loss and config.ppo.clip != PPO.model_fields["clip"].default:
        yield OptionError("ppo.clip", "is not read by verl's losses; set clip_ratio in ppo.policy_loss.params")
    for name, endpoint in config.endpoints.items():
        if endpoint.url is not None and endpoint.serve:
            yield OptionError(f"endpoints.{name}.serve", "is for models that the run serves; leave out url or serve")


def _stored_secrets(config: Config) -> Iterator[OptionError]:
    """Yields an error for each value that seems to be a secret. The file recipe.yaml stores all values. A recipe may
    therefore contain the name of an environment variable, but not the secret itself."""
    for key, problem in secret_options(config.model_dump()):
        advice = "put it into an environment variable, and give only the name of the variable"
        if ".params." in key:
            advice += f", for example in {key.rpartition('.')[2]}_env"
        if ".serve." in key:
            advice = "leave it out: the run makes a random key for the models that it serves"
        yield OptionError(key, f"{problem}, and would be stored in recipe.yaml; {advice}")


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
