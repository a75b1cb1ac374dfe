"""Typed clients of policy and critic, which run in other processes. A method that returns a Future does not wait."""

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
"""Digest of a picture -> its features [image tokens, hidden], or the Future of them."""
Learner = TypeVar("Learner", bound=Sharded)


class LearnerClient(Generic[Learner]):
    """The calls that policy and critic have in common."""

    def __init__(self, remote: Remote[Learner]) -> None:
        self.remote = remote

    def save(self, model: Path, state: Path) -> Future[int]:
        """Copies weights and training state and writes them in the background. Returns the optimizer steps so far."""
        return self.remote.start(Sharded.save, model, state)

    def written(self) -> bool:
        """True if all ranks have written what `save` copied."""
        return all([pending.result() for pending in [rank.start(Sharded.written) for rank in self.remote.ranks]])

    def restore(self, model: Path, state: Path, steps: int) -> Future[None]:
        """Loads what `save` wrote after `steps` optimizer steps."""
        return self.remote.start(Sharded.restore, model, state, steps)


class EncoderClient:
    """The frozen vision encoder in one process of the policy."""

    def __init__(self, remote: Remote[Policy]) -> None:
        self.remote = remote

    def encode(self, picture: Picture) -> Future[Tensor]:
        """Features [image tokens, hidden] of a picture."""
        return self.remote.start(Policy.encode, picture)

    def encoded(self) -> Future[dict[str, int]]:
        """Digest -> bytes of the features that were computed since the last time this was called."""
        return self.remote.start(Policy.encoded)


class PolicyClient(LearnerClient[Policy]):
    """rl.learner.policy.Policy in its processes."""

    @property
    def encoders(self) -> list[EncoderClient]:
        """The vision encoder of each rank."""
        return [EncoderClient(rank) for rank in self.remote.ranks]

    def update(self, batch: Batch, targets: Targets, features: Features, iteration: int) -> dict[str, float]:
        """Runs the PPO update. Returns policy/* metrics."""
        return self.remote.start(Policy.update, batch, targets, features, iteration).result()

    def weights(self) -> Future[dict[str, Any]]:
        """The trained tensors by their names on disk."""
        return self.remote.start(Policy.weights)

    def logprob_gap(self, rollouts: Sequence[Rollout], features: Features) -> float:
        """Mean |engine - learner| over the response tokens, in nats."""
        return self.remote.start(Policy.logprob_gap, rollouts, features).result()


class CriticClient(LearnerClient[Critic]):
    """rl.learner.critic.Critic in its processes."""

    def values(self, batch: Batch, features: Features) -> tuple[Tensor, Tensor]:
        """Values before each response token [N, R] and after the last one [N]."""
        return self.remote.start(Critic.values, batch, features).result()

    def update(self, batch: Batch, targets: Targets, features: Features, iteration: int) -> Future[dict[str, float]]:
        """Begins the value update, which can run beside the policy's. Returns value/* metrics."""
        return self.remote.start(Critic.update, batch, targets, features, iteration)
