"""The options of a recipe that policy and critic read."""

from dataclasses import dataclass
from pathlib import Path

from rl.config import PPO, Config


@dataclass(frozen=True)
class LearnerOptions:
    """Options with the names that they have in the recipe; rl.config describes them. Policy and critic of a run share
    one LearnerOptions."""

    ppo: PPO
    seed: int
    temperature: float  # rollout.temperature: the learner computes logprobs with the engine's sampling temperature
    token_budget: int
    threads: int | None
    activation_checkpointing: bool
    dtype: str
    yarn: float | None
    freeze: tuple[str, ...]
    critic: Path | None  # model.critic
    chat_template: Path | None
    synthesis_template: Path | None  # synthesis.template

    @classmethod
    def of(cls, config: Config) -> "LearnerOptions":
        """Returns the learner's options of a whole configuration."""
        model, learner = config.model, config.learner
        return cls(
            ppo=config.ppo,
            seed=config.seed,
            temperature=config.rollout.temperature,
            token_budget=learner.token_budget,
            threads=learner.threads,
            activation_checkpointing=learner.activation_checkpointing,
            dtype=model.dtype,
            yarn=model.yarn,
            freeze=model.freeze,
            critic=model.critic,
            chat_template=model.chat_template,
            synthesis_template=config.synthesis.template,
        )
