"""Tests that policy and critic compute the same numbers in two processes (FSDP2 on gloo) as in one process."""

import json
import multiprocessing
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl.learner.batch import Batch, collate
from rl.learner.critic import Critic
from rl.learner.distributed import Ranks
from rl.learner.policy import Policy
from rl.learner.targets import make_targets
from rl.model import hf_folder
from rl.types import Prompt, Rollout, Scored
from tests.support.learner import PICTURES, options
from tests.support.models import IMAGE_TOKEN, step_vl, text_model
from tests.support.ranks import run_together

ITERATIONS = 2


def batch(prompts: int, *, pictures: bool) -> Batch:
    """Returns a batch. If `pictures` is True, every third prompt has pictures. Each group has one to three responses of
    different lengths."""
    scored = []
    generator = torch.Generator().manual_seed(3)
    for number in range(prompts):
        images = PICTURES[: 1 + number % 2] if pictures and number % 3 == 0 else []
        prompt_ids = (IMAGE_TOKEN,) * 4 * len(images) + tuple(range(10, 14 + number % 2))
        for index in range(1 + number % 3):
            length = 1 + (5 * number + 3 * index) % 11
            response = tuple(torch.randint(10, 60, (length,), generator=generator).tolist())
            rollout = Rollout(
                Prompt(str(number), "t", (), tuple(images)), "", "stop", prompt_ids, response, (-4.0,) * length
            )
            scored.append(Scored(rollout, float(torch.rand((), generator=generator))))
    return collate(scored)


CASES: dict[str, dict[str, Any]] = {
    "pictures and text": {"prompts": 7, "pictures": True},
    # There is one group for two ranks. So one rank gets a packed row whose results are ignored (`counts` is False).
    "fewer groups than ranks": {"prompts": 1, "pictures": False, "ppo": {"minibatches": 1, "critic_minibatches": 1}},
    "clip, entropy, recomputation": {
        "prompts": 5,
        "pictures": True,
        "ppo": {"ratio": "clip", "entropy": 0.01},
        "learner": {"activation_checkpointing": True, "token_budget": 64},
    },
    "tied embeddings": {"prompts": 4, "pictures": False, "tied": True},
}


@dataclass(frozen=True)
class Pair:
    """The policy and the critic of one case, and the batch that every iteration trains on."""

    policy: Policy
    critic: Critic
    data: Batch
    features: dict[str, Tensor]

    @classmethod
    def of(cls, ranks: Ranks, case: dict[str, Any], folder: str) -> "Pair":
        made = options({"policy_lr": 1e-3, "critic_lr": 1e-3, **case.get("ppo", {})}, **case.get("learner", {}))
        policy, critic = Policy(folder, made, ranks), Critic(folder, made, ranks)
        features = {p.digest: policy.encode(p) for p in PICTURES} if case["pictures"] else {}
        return cls(policy, critic, batch(case["prompts"], pictures=case["pictures"]), features)

    def iterate(self, iteration: int) -> dict[str, float]:
        values, final = self.critic.values(self.data, self.features)
        targets = make_targets(self.data, values, final, self.policy.options.ppo)
        given = self.data, targets, self.features, iteration
        return self.critic.update(*given) | self.policy.update(*given)

    def keep(self, file: Path) -> None:
        """Writes the batch's logprobs and values, and the policy's weights, to a file."""
        values = self.critic.values(self.data, self.features)[0]
        tensors = {"logprobs": self.policy.logprobs(self.data, self.features), "values": values}
        weights = self.policy.weights()
        assert bool(weights) == self.policy.ranks.is_first
        if self.policy.ranks.is_first:
            tensors |= {name: torch.as_tensor(weight).clone() for name, weight in weights.items()}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    def save(self, folder: Path) -> None:
        models = {"policy": self.policy, "critic": self.critic}
        steps = {}
        for name, model in models.items():
            steps[name] = model.save(folder / name, folder / "state" / name)
            # Only one model is saved at a time. In this test both models use the same process group, and two saves at
            # the same time could wait for each other forever.
            while not model.written():
                time.sleep(0.02)
        (folder / "steps.json").write_text(json.dumps(steps))

    def restore(self, folder: Path) -> None:
        steps = json.loads((folder / "steps.json").read_text())
        self.policy.restore(folder / "policy", folder / "state/policy", steps["policy"])
        self.critic.restore(folder / "critic", folder / "state/critic", steps["critic"])


def trained(ranks: Ranks, case: dict[str, Any], folder: Path, results: Path) -> None:
    """Trains critic and policy for two iterations, saves a checkpoint, and trains one more iteration. Writes the
    results before and after the last iteration."""
    pair = Pair.of(ranks, case, str(folder / "model"))
    numbers: dict[str, float] = {}
    for iteration in range(1, ITERATIONS + 1):
        numbers |= {f"{name} {iteration}": value for name, value in pair.iterate(iteration).items()}
    pair.keep(results / "tensors")
    pair.save(results)
    if ranks.is_first:
        (results / "numbers.json").write_text(json.dumps(numbers))
    pair.iterate(ITERATIONS + 1)
    pair.keep(results / "one iteration later")


def continued(ranks: Ranks, case: dict[str, Any], folder: Path, results: Path) -> None:
    """Loads the checkpoint in `results`, which was saved by a different number of ranks. Trains one more iteration and
    writes the results of this iteration."""
    pair = Pair.of(ranks, case, str(folder / "model"))
    pair.restore(results)
    pair.iterate(ITERATIONS + 1)
    pair.keep(results / "continued")


def one_of_two(rank: int, address: str, folder: Path) -> None:
    """Runs all cases in the process of one rank. There are two ranks, and `rank` is the number of this rank."""
    ranks = Ranks("cpu", rank, 2, address, threads=1)
    for name, case in CASES.items():
        trained(ranks, case, folder / name, folder / name / "2")
        continued(ranks, case, folder / name, folder / name / "1")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with the results of each case. The subfolder <case>/1 has the results of one rank, and <case>/2 has the
    results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = Ranks("cpu", threads=1)
    for name, case in CASES.items():
        hf_folder.save(text_model(tied=True) if case.get("tied") else step_vl(), folder / name / "model")
        for count in "12":
            (folder / name / count).mkdir()
        trained(alone, case, folder / name, folder / name / "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run_together(one_of_two, [(rank, address, folder) for rank in range(2)], limit_s=300)
    for name, case in CASES.items():
        continued(alone, case, folder / name, folder / name / "2")
    return folder


def assert_close(one: Path, two: Path) -> None:
    ours, theirs = load_file(one), load_file(two)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_return_the_same_numbers_as_one(name, results):
    one, two = (json.loads((results / name / count / "numbers.json").read_text()) for count in "12")
    assert one.keys() == two.keys()
    for key, number in one.items():
        assert two[key] == pytest.approx(number, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("file", ["tensors", "policy/model.safetensors", "critic/model.safetensors"])
def test_two_ranks_save_and_return_the_same_tensors_as_one(name, file, results):
    assert_close(results / name / "1" / file, results / name / "2" / file)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("saved_by", ["1", "2"])
def test_a_checkpoint_continues_the_same_way_with_another_number_of_ranks(name, saved_by, results):
    found = results / name / saved_by
    assert_close(found / "one iteration later", found / "continued")


def test_every_rank_writes_its_own_share_of_the_training_state(results):
    for name in ("policy", "critic"):
        files = sorted((results / "pictures and text/2/state" / name).iterdir())
        assert len(files) == 2 and all(file.suffix == ".safetensors" for file in files)


def test_all_ranks_are_killed_after_the_time_limit_or_the_failure_of_one_rank():
    with pytest.raises(TimeoutError, match=r"has not ended after 0\.5 s"):
        run_together(time.sleep, [(600,), (600,)], limit_s=0.5)
    with pytest.raises(RuntimeError, match="has failed with exit code 1"):
        run_together(time.sleep, [(-1,), (600,)], limit_s=60)
    assert multiprocessing.active_children() == []
