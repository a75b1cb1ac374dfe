"""Tests that rl.run trains tiny Qwen2.5-VL and Qwen3-VL folders with a critic, on rows with and without pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.model.weight_files import read_tensors
from tests.support import qwen_vl, tiny
from tests.support.command import ROOT, metrics, run, samples

SIZES = ((120, 90), (300, 60), (56, 200))


def write_rows(folder: Path, name: str, count: int) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(count):
        shown = [f"{name}-{n}-{k}.png" for k in range(n % 3)]  # no picture, one picture, two pictures
        for k, file in enumerate(shown):
            tiny.image(SIZES[(n + k) % len(SIZES)], n + k).save(folder / file)
        parts = [*({"type": "image", "image": file} for file in shown), {"type": "text", "text": f"w{n} w1"}]
        row = {"id": f"{name}-{n}", "task": "echo", "messages": [{"role": "user", "content": parts}]}
        rows.append(row | {"ground_truth": f"w{n}"})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, output: str, *options: str) -> Path:
    code, _, err = run(
        "rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu", "--output", output, f"model.path={folder}/model",
        f"data.train={folder}/train.jsonl", f"data.eval={folder}/heldout.jsonl", "rewards.echo={use: exact}",
        "prompts_per_iteration=6", "rollouts_per_prompt=4", "max_sequence_length=128", "learner.token_budget=512",
        "checkpoint.every=1", "ppo.policy_lr=1e-3", *options, folder=folder,
    )  # fmt: skip
    assert code == 0, err
    return folder / output


def folder_of(family: str, folder: Path) -> Path:
    """Writes a model folder and rows. Returns `folder`."""
    qwen_vl.make(family, folder / "model", tied=family == "qwen3_vl")
    for name, count in (("train", 12), ("heldout", 6)):
        write_rows(folder, name, count)
    return folder


@pytest.mark.parametrize(("family", "ranks"), [pytest.param("qwen2_5_vl", 1, marks=pytest.mark.slow), ("qwen3_vl", 2)])
def test_a_run_trains_the_decoder_and_a_critic_and_leaves_the_tower_as_it_was(
    family: str, ranks: int, tmp_path: Path
) -> None:
    whole = train(folder_of(family, tmp_path), "whole", "iterations=2", f"learner.ranks={ranks}")
    lines = metrics(whole)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert lines[0]["rollout/logprob_gap_rows"] < 1e-4
    assert max(line.get("rollout/logprob_gap", 0) for line in lines) < 1e-4
    assert lines[1]["time/engine_encodings"] > 0
    assert all("value/loss" in line and line["reward/invalid_fraction"] == 0 for line in lines[1:])
    before, after = (dict(read_tensors(folder)) for folder in (tmp_path / "model", whole / "policy"))
    assert before.keys() == after.keys()
    frozen = [name for name in before if name.startswith("visual.")]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    responses = [sample["response"] for n in (1, 2) for sample in samples(whole, n)]
    assert responses and not any("image_pad" in text or "video_pad" in text for text in responses)
    saved: Any = qwen_vl.MODELS[family].from_pretrained(whole / "policy", dtype=torch.float32)
    assert torch.equal(saved.model.language_model.norm.weight, after["model.norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", qwen_vl.FAMILIES)
def test_a_resumed_run_ends_with_the_same_bits(family: str, ranks: int, tmp_path: Path) -> None:
    folder_of(family, tmp_path)
    after = dict(read_tensors(train(tmp_path, "whole", "iterations=2", f"learner.ranks={ranks}") / "policy"))
    train(tmp_path, "resumed", "iterations=1", f"learner.ranks={ranks}")
    code, _, err = run("rl.run", "--resume", tmp_path / "resumed", "iterations=2")
    assert code == 0, err
    again = dict(read_tensors(tmp_path / "resumed/policy"))
    assert all(torch.equal(after[name], again[name]) for name in after)
