"""Learner and critic split over processes (FSDP2 on gloo): the same numbers as in one, whatever each of them gets."""

import json
import socket
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.config import Config
from rl.critic import Critic
from rl.learner import Policy
from rl.model import checkpoint
from rl.packing import Batch, Group, balanced, collate, rows_of_rank
from rl.ranks import Ranks
from rl.targets import make_targets
from rl.types import Prompt, Rollout, Scored
from tests.models import IMAGE_TOKEN, step_vl, text_model
from tests.test_learner import PICTURES, config
from tests.test_packing import group

ITERATIONS = 2


def batch(prompts: int, *, pictures: bool) -> Batch:
    """Every third prompt shows pictures; groups of one to three responses of uneven lengths."""
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
    # one group for two ranks, whose prompt has no picture: the second rank only keeps step
    "fewer groups than ranks": {"prompts": 2, "pictures": False, "ppo": {"minibatches": 1, "critic_minibatches": 1}},
    "clip, entropy, recomputation": {
        "prompts": 5,
        "pictures": True,
        "ppo": {"ratio": "clip", "entropy": 0.01},
        "learner": {"activation_checkpointing": True, "token_budget": 64},
    },
    "tied embeddings": {"prompts": 4, "pictures": False, "tied": True},
}


def trained(ranks: Ranks, case: dict[str, Any], folder: str, results: Path) -> None:
    """Two iterations of critic and policy; saves what came out."""
    made = config(folder, policy_lr=1e-3, critic_lr=1e-3, **case.get("ppo", {}))
    learner = made.learner.model_copy(update=case.get("learner", {}))
    cfg: Config = made.model_copy(update={"learner": learner})
    policy, critic = Policy(folder, cfg, ranks), Critic(folder, cfg, ranks)
    data = batch(case["prompts"], pictures=case["pictures"])
    features = {p.digest: policy.encode(p) for p in PICTURES} if case["pictures"] else {}
    numbers: dict[str, float] = {}
    for iteration in range(1, ITERATIONS + 1):
        values, final = critic.values(data, features)
        targets = make_targets(data, values, final, cfg.ppo)
        found = critic.update(data, targets, features, iteration) | policy.update(data, targets, features, iteration)
        numbers |= {f"{name} {iteration}": value for name, value in found.items()}
    tensors = {"logprobs": policy.logprobs(data, features), "values": critic.values(data, features)[0]}
    policy.save(results / "policy", results / "state")
    critic.save(results / "critic", results / "state")
    weights = policy.weights()
    assert bool(weights) == ranks.first
    if ranks.first:
        tensors |= {name: torch.as_tensor(weight).clone() for name, weight in weights.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, results / "tensors")
        (results / "numbers.json").write_text(json.dumps(numbers))


def all_cases(rank: int, count: int, address: str | None, folder: Path) -> None:
    """One process of `count`: what it does for every case, one after the other."""
    ranks = Ranks("cpu", rank, count, address, threads=1)
    for name, case in CASES.items():
        trained(ranks, case, str(folder / name / "model"), folder / name / str(count))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Folder with <case>/<number of ranks>, from one process and from two that were started once."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, case in CASES.items():
        checkpoint.save(text_model(tied=True) if case.get("tied") else step_vl(), folder / name / "model")
        for count in (1, 2):
            (folder / name / str(count)).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context = get_context("spawn")
    started = [context.Process(target=all_cases, args=(rank, 2, address, folder)) for rank in range(2)]
    for process in started:
        process.start()
    all_cases(0, 1, None, folder)
    for process in started:
        process.join(timeout=300)
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_numbers_of_one(name, results):
    one, two = (json.loads((results / name / count / "numbers.json").read_text()) for count in "12")
    assert one.keys() == two.keys()
    for key, number in one.items():
        assert two[key] == pytest.approx(number, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_save_and_hand_on_the_tensors_of_one(name, results):
    state = "state/policy_optimizer.safetensors", "state/critic_optimizer.safetensors"
    for file in ("tensors", "policy/model.safetensors", "critic/model.safetensors", *state):
        one, two = (load_file(results / name / count / file) for count in "12")
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_every_rank_has_as_many_rows_and_every_response_counts_once():
    groups = [group(5, *[4] * 7, first_row=0), group(3, 2, 9, first_row=7), group(1, 1, first_row=9)]
    ranks = [rows_of_rank(groups, 20, None, rank=r, ranks=3, pairs_per_token=10.0) for r in range(3)]
    assert len({len(rows) for rows in ranks}) == 1
    counted = [i for rows in ranks for row in rows if row.counts for i in row.pack.rows.tolist()]
    assert sorted(counted) == list(range(10))


def test_a_rank_without_work_keeps_step_with_the_smallest_row():
    rows = rows_of_rank([group(5, 4)], 20, None, rank=0, ranks=2, pairs_per_token=10.0)
    other = rows_of_rank([group(5, 4)], 20, None, rank=1, ranks=2, pairs_per_token=10.0)
    assert sorted([rows[0].counts, other[0].counts]) == [False, True]


def test_work_is_shared_evenly():
    # differences 8 - 7 = 1 and 6 - 5 = 1, then 4 - 1 = 3, then 3 - 1 = 2: sums of 14 and 16
    assert balanced([8, 7, 6, 5, 4], 2) == [[0, 2], [1, 3, 4]]
    assert balanced([], 2) == [[], []]
    work = torch.empty(200).log_normal_(0, 1, generator=torch.Generator().manual_seed(0)).tolist()
    sums = [sum(work[i] for i in share) for share in balanced(work, 8)]
    assert sorted(i for share in balanced(work, 8) for i in share) == list(range(200))
    assert max(sums) - min(sums) < 0.01 * max(sums)


def test_pairs_count_what_attention_compares():
    made: Group = group(3, 2, 1)
    assert made.pairs == (1 + 2 + 3) + (4 + 5) + 4
