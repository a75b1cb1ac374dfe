"""Typed clients for the policy and the critic, which run in other processes.

A method that returns a Future does not wait for the result.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from rl.learner.batch import Batch
from rl.learner.critic import Critic
from rl.learner.policy import Policy
from rl.learner.sharded import Sharded
from rl.learner.targets import Targets
from rl.remote import Future, Remote
from rl.types import Picture, Rollout

Features = Mapping[str, Any]
"""Maps the digest of a picture to the picture's features [image tokens, hidden], or to a Future of the features."""
Learner = TypeVar("Learner", bound=Sharded)


class LearnerClient(Generic[Learner]):
    """The methods that the clients of policy and critic have in common."""

    def __init__(self, remote: Remote[Learner]) -> None:
        self.remote = remote

    def save(self, model: Path, state: Path) -> Future[int]:
        """Copies weights and training state, and writes the copies in the background. Returns the number of optimizer
        steps so far."""
        return self.remote.start(Sharded.save, model, state)

    def written(self) -> bool:
        """True if every rank has finished writing the copies that `save` made."""
        return all([pending.result() for pending in [rank.start(Sharded.written) for rank in self.remote.ranks]])

    def restore(self, model: Path, state: Path, steps: int) -> Future[None]:
        """Loads the weights and the training state that `save` wrote after `steps` optimizer steps."""
        return self.remote.start(Sharded.restore, model, state, steps)


class EncoderClient:
    """Calls the frozen vision encoder in one process of the policy."""

    def __init__(self, remote: Remote[Policy]) -> None:
        self.remote = remote

    def encode(self, picture: Picture) -> Future[Tensor]:
        """Returns the features of a picture, [image tokens, hidden]."""
        return self.remote.start(Policy.encode, picture)

    def encoded(self) -> Future[dict[str, int]]:
        """Returns {digest of a picture: size of its features in bytes} for all pictures encoded since the last call."""
        return self.remote.start(Policy.encoded)


class PolicyClient(LearnerClient[Policy]):
    """Calls rl.learner.policy.Policy in the processes of the policy."""

    @property
    def encoders(self) -> list[EncoderClient]:
        """One client per rank, which calls the vision encoder of that rank."""
        return [EncoderClient(rank) for rank in self.remote.ranks]

    def update(self, batch: Batch, targets: Targets, features: Features, iteration: int) -> dict[str, float]:
        """Runs the PPO update. Returns policy/* metrics."""
        return self.remote.start(Policy.update, batch, targets, features, iteration).result()

    def weights(self) -> Future[dict[str, Any]]:
        """Returns the trained tensors, keyed by their names in the model folder."""
        return self.remote.start(Policy.weights)

    def logprob_gap(self, rollouts: Sequence[Rollout], features: Features) -> float:
        """Returns the mean absolute difference, in nats, between the engine's and the learner's logprobs of response
        tokens."""
        return self.remote.start(Policy.logprob_gap, rollouts, features).result()


class CriticClient(LearnerClient[Critic]):
    """Calls rl.learner.critic.Critic in the processes of the critic."""

    def values(self, batch: Batch, features: Features) -> tuple[Tensor, Tensor]:
        """Returns two tensors: the value before each response token [N, R], and the value after the last response token
        [N]."""
        return self.remote.start(Critic.values, batch, features).result()

    def update(self, batch: Batch, targets: Targets, features: Features, iteration: int) -> Future[dict[str, float]]:
        """Starts the critic's update, which can run at the same time as the policy's update. Returns value/*
        metrics."""
        return self.remote.start(Critic.update, batch, targets, features, iteration)
