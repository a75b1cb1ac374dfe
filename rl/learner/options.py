"""The options of a recipe that policy and critic read."""

from dataclasses import dataclass
from pathlib import Path

from rl.config import PPO, Config, Learner, Model


@dataclass(frozen=True)
class LearnerOptions:
    """The options have the same names as in the recipe, and rl.config describes them. Policy and critic of a run use
    the same LearnerOptions."""

    ppo: PPO
    model: Model
    learner: Learner
    seed: int
    temperature: float  # rollout.temperature: the learner computes logprobs with the engine's sampling temperature
    synthesis_template: Path | None  # synthesis.template

    @classmethod
    def of(cls, config: Config) -> "LearnerOptions":
        """Selects the learner's options from a whole configuration."""
        return cls(
            config.ppo, config.model, config.learner, config.seed, config.rollout.temperature, config.synthesis.template
        )
