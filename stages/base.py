"""The base class of stages. A stage is one class in one file; stages/__init__.py registers it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from rl.config import Config, CurationOptions, OptionError
from rl.types import Prompt, Scored

if TYPE_CHECKING:
    from rollout.chat import Chat


class SampleAndScore(Protocol):
    """Samples responses with the current policy and scores them."""

    def __call__(self, prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
        """Returns `per_prompt` scored rollouts of each prompt; rollouts of the same prompt are neighbours."""
        ...


@dataclass(frozen=True)
class StageTools:
    """Objects that a stage may use during a run."""

    config: Config
    chat: "Chat"
    penalties: frozenset[str]  # names of the recipe's penalties, as in `Scored.parts`
    sample_and_score: SampleAndScore


class Stage:
    """One kind of RL training. This base class trains on unchanged rows and has no metrics of its own.

    The class methods are used before a run, to check a recipe. The instance is used during a run.
    """

    name: ClassVar[str]
    """The value of the option `stage`, the name of the stage's section in a recipe and of its folder in a chain."""
    defaults: ClassVar[Mapping[str, Any]]
    """Default values of options: at least the four sizes and the minibatches."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options of this stage only; other stages refuse them."""
    own_metrics: ClassVar[Mapping[str, str]] = {}
    """Metrics that only this stage has, by name, each with a sentence. Stages of this project have theirs in
    rl/record/metrics.yaml."""
    selection: ClassVar[str] = ""
    """The rule of `selects`, as the end of the sentence "none of the rows ..."."""
    comparable_evaluation: ClassVar[bool] = True
    """True if the evaluation before training also measures the stage before, because it uses unchanged rows."""
    final_measure: ClassVar[Literal["accuracy", "win_rate"]] = "accuracy"
    """What the last evaluation of a chain measures on the held-out rows of this stage."""

    # Recipe

    @classmethod
    def option_problems(cls, config: Config) -> Iterable[OptionError]:
        """Returns a problem for each option whose value does not fit this stage."""
        return ()

    @classmethod
    def curation_problem(cls, config: Config, curation: CurationOptions) -> str | None:
        """Returns why this stage cannot train on the rows of a curation with these options, or None."""
        return None

    @classmethod
    def before_curation(cls, config: Config) -> Config:
        """Returns a config that can be checked before the curation has made the rows of this stage."""
        return config

    # Rows

    @classmethod
    def row_problem(cls, prompt: Prompt, config: Config, chat: "Chat", *, trains: bool) -> str | None:
        """Returns why a row cannot be used, or None.

        Args:
            trains: True for a training row, False for a held-out one.
        Raises: ValueError, if the row cannot be used; its message says why.
        """
        return room_problem(chat.length(prompt), "pictures", config)

    @classmethod
    def selects(cls, prompt: Prompt, config: Config) -> bool:
        """True if this stage trains on a row. Other rows are counted and left out."""
        return True

    # Plan and chain

    @classmethod
    def plan_lines(cls, config: Config, left_out: int = 0) -> list[str]:
        """Returns lines for the plan that only this stage has.

        Args:
            left_out: the number of rows that `selects` rejected.
        """
        return []

    @classmethod
    def final_tasks(cls, config: Config) -> Collection[str] | None:
        """Returns the tasks that the last evaluation of a chain measures; None: all."""
        return None

    # Run

    def __init__(self, tools: StageTools) -> None:
        self.tools = tools

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Returns the prompts that the policy gets for an iteration's rows."""
        return list(prompts)

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Returns the prompts that the policy gets for held-out rows in an evaluation."""
        return list(prompts)

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        """Returns metrics of this stage for an iteration's samples."""
        return {}

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        """Returns metrics of this stage for the samples of an evaluation."""
        return {}


def room_problem(tokens: int, included: str, config: Config) -> str | None:
    """Returns a message if a prompt of so many tokens leaves no room for a response, or None.

    Args:
        included: what the number of tokens includes, for the message.
    """
    if tokens < config.max_sequence_length:
        return None
    return (
        f"its {tokens} tokens, {included} included, leave no room for a response in max_sequence_length "
        f"{config.max_sequence_length}"
    )
