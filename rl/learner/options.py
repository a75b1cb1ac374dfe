"""The options of a recipe that policy and critic read."""

from dataclasses import dataclass
from pathlib import Path

from rl.config import PPO, Config, Learner, Model


@dataclass(frozen=True)
class LearnerOptions:
    """Named as in the recipe, where rl.config describes each. Policy and critic of a run share one."""

    ppo: PPO
    model: Model
    learner: Learner
    seed: int
    temperature: float  # rollout.temperature: logprobs are computed with the temperature that the engine samples with
    synthesis_template: Path | None  # synthesis.template

    @classmethod
    def of(cls, config: Config) -> "LearnerOptions":
        """The options in a whole configuration."""
        return cls(
            config.ppo, config.model, config.learner, config.seed, config.rollout.temperature, config.synthesis.template
        )
