"""The base class of stages. Each stage is one class in its own file, and stages/__init__.py registers it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from rl.config import Config, CurationOptions, OptionError
from rl.types import Prompt, Scored

if TYPE_CHECKING:
    from rollout.chat import Chat


class SampleAndScore(Protocol):
    """Samples responses with the current policy, and scores these responses."""

    def __call__(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
        """Returns `per_prompt` scored rollouts for each prompt. In the list, the rollouts of a prompt are next to
        each other."""
        ...


@dataclass(frozen=True)
class StageTools:
    """Objects that a stage may use during a run."""

    config: Config
    chat: "Chat"
    penalties: frozenset[str]  # names of the recipe's penalties, spelled as in `Scored.parts`
    sample_and_score: SampleAndScore


class Stage:
    """One kind of RL training. The base class trains on unchanged rows and adds no metrics.

    The class methods check a recipe before a run. An instance of the stage is used during the run.
    """

    name: ClassVar[str]
    """The stage's name. It is the value of the option `stage`, and the name of the stage's folder in a chain."""
    defaults: ClassVar[Mapping[str, Any]]
    """Default values of options. stages/rlvr.py shows the options that every stage must set."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options that only this stage accepts. Other stages refuse these options."""
    own_metrics: ClassVar[Mapping[str, str]] = {}
    """Metrics that only this stage has: name of the metric -> sentence that explains the metric. The metrics of this
    project's stages are in rl/record/metrics.yaml."""
    selection: ClassVar[str] = ""
    """Describes the rows that `selects` accepts. The error message "none of the ... rows" ends with this text."""
    comparable_evaluation: ClassVar[bool] = True
    """True if this stage evaluates on unchanged rows. In this case, this stage's evaluation before training also
    measures the policy of the previous stage."""
    final_measure: ClassVar[Literal["accuracy", "win_rate"]] = "accuracy"
    """The final evaluation of a chain computes this measure on the held-out rows of this stage."""

    # Recipe

    @classmethod
    def option_problems(cls, config: Config) -> Iterable[OptionError]:
        """Returns one error for each option whose value this stage cannot use."""
        return ()

    @classmethod
    def curation_problem(cls, config: Config, curation: CurationOptions) -> str | None:
        """Returns None if this stage can train on the rows of a curation, else the reason why not.

        Args:
            curation: the options of the curation.
        """
        return None

    @classmethod
    def before_curation(cls, config: Config) -> Config:
        """Returns a config for a check that runs before the curation. The rows of this stage do not exist then."""
        return config

    # Rows

    @classmethod
    def row_problem(cls, prompt: Prompt, config: Config, chat: "Chat", *, trains: bool) -> str | None:
        """Returns None if this stage can use the row, else the reason why not.

        Args:
            trains: True for a training row, False for a held-out row.
        Raises: ValueError if no prompt can be made from the row, for example because the chat template fails. The
            caller then uses the error message as the reason.
        """
        return room_problem(chat.length(prompt), "pictures", config)

    @classmethod
    def selects(cls, prompt: Prompt, config: Config) -> bool:
        """True if this stage trains on this row. The plan leaves the other rows out and counts them."""
        return True

    # Plan and chain

    @classmethod
    def plan_lines(cls, config: Config, left_out: int = 0) -> list[str]:
        """Returns lines that this stage adds to the printed plan.

        Args:
            left_out: the number of rows that `selects` rejected.
        """
        return []

    @classmethod
    def final_tasks(cls, config: Config) -> Collection[str] | None:
        """Returns the tasks that the final evaluation of a chain measures. None means all tasks."""
        return None

    # Run

    def __init__(self, tools: StageTools) -> None:
        self.tools = tools

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Converts the rows of an iteration into the prompts that the policy gets."""
        return list(prompts)

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Converts held-out rows into the prompts that the policy gets in an evaluation."""
        return list(prompts)

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        """Returns the metrics that this stage adds for the samples of an iteration."""
        return {}

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        """Returns the metrics that this stage adds for the samples of an evaluation."""
        return {}


def room_problem(tokens: int, included: str, config: Config) -> str | None:
    """Returns None if a prompt leaves room for a response, else an error message.

    Args:
        tokens: the number of tokens of the prompt.
        included: says what `tokens` counts in addition to the text of the prompt, for example "pictures". The error
            message contains these words.
    """
    if tokens < config.max_sequence_length:
        return None
    return (
        f"its {tokens} tokens, {included} included, leave no room for a response in max_sequence_length "
        f"{config.max_sequence_length}"
    )
