"""Tests rl.run at a small size, with real Ray, vLLM, critic, policy and pictures.

Most tests read the results of one undisturbed run. Other tests interrupt a run and resume it. The resumed run must have
the same results as the undisturbed run.
"""

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.model import hf_folder
from rl.run import main
from tests.chaos import strike
from tests.support.command import (
    ROOT,
    SMALL_RUN,
    Command,
    metrics,
    named,
    run,
    samples,
    wait_for,
    wait_for_iteration,
    without_times,
)
from tests.support.engine_process import engine
from tests.support.small_disk import change, small_disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an undisturbed run, and the standard output of this run."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, out, err = run(*SMALL_RUN, "--output", folder)
    assert code == 0, err
    return folder, out


def test_a_run_leaves_the_documented_folder(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "policy",
        "recipe.yaml",
        "rewards.json",
        "rollouts",
        "tracking",
    ]
    assert [line["iteration"] for line in metrics(folder)] == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000002", "000004"]
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == [f"{i:06d}.jsonl.gz" for i in range(1, 5)]


def test_held_out_rows_are_scored_before_training_and_as_often_as_the_recipe_says(finished: tuple[Path, str]) -> None:
    evaluated = [m["iteration"] for m in metrics(finished[0]) if any(k.startswith("eval/") for k in m)]
    assert evaluated == [0, 2, 4]


def test_every_iteration_has_the_documented_metrics(finished: tuple[Path, str]) -> None:
    names = {
        "reward/mean", "reward/std", "reward/invalid_fraction", "reward/flat_group_fraction", "response/tokens_mean",
        "response/truncated_fraction", "policy/loss", "policy/entropy", "policy/approx_kl", "policy/clip_fraction",
        "policy/grad_norm", "policy/lr", "policy/tis_mean", "policy/tis_capped_fraction", "value/loss",
        "rollout/logprob_gap", "rollout/tokens_per_second", "rollout/staleness", "time/rollout", "time/reward",
        "time/critic", "time/policy", "time/sync", "time/total",
    }  # fmt: skip
    for line in metrics(finished[0])[1:]:
        assert names <= line.keys()
        assert line["rollout/logprob_gap"] < 1e-4
        assert line["reward/invalid_fraction"] == 0


def test_samples_hold_the_row_the_response_and_its_score(finished: tuple[Path, str]) -> None:
    found = samples(finished[0], 1)
    assert len(found) == 32
    assert {"id", "task", "messages", "ground_truth", "response", "reward", "finish"} <= found[0].keys()
    assert any(isinstance(s["messages"][0]["content"], list) for s in found)  # at least one prompt has pictures


def test_tower_and_projector_stay_bit_identical_and_the_decoder_changes(finished: tuple[Path, str]) -> None:
    before = load_file(ROOT / "recipes/scale/model/model.safetensors")
    after = load_file(finished[0] / "policy/model.safetensors")
    frozen = {name for name in before if name.startswith(("vision_model.", "vit_large_projector."))}
    assert all(torch.equal(before[name].float(), after[name]) for name in frozen)
    assert any(not torch.equal(before[name].float(), after[name]) for name in before.keys() - frozen)


def test_the_screen_shows_progress_and_what_was_learned(finished: tuple[Path, str]) -> None:
    out = finished[1]
    assert "rlvr 4/4" in out and "held-out reward before and after training" in out
    assert str(finished[0] / "policy") in out


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_ends_like_an_undisturbed_run(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    command = Command(*SMALL_RUN, "--output", folder)
    wait_for_iteration(folder, 3, command)
    command.interrupt()
    code, out, _ = command.finish()
    assert code == 130 and f"--resume {folder}" in out
    assert command.left_behind() == []
    code, _, err = run("rl.run", "--resume", folder)
    assert code == 0, err
    assert_same(folder, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "options"), [(signal.SIGHUP, ()), (signal.SIGUSR1, ("--stop-signal", "SIGUSR1"))])
def test_a_signal_to_every_process_of_a_run_saves_it(number: int, options: tuple[str, ...], tmp_path: Path) -> None:
    command = Command(*SMALL_RUN, "checkpoint.every=100", "data.eval=[]", *options, "--output", tmp_path / "run")
    wait_for_iteration(tmp_path / "run", 1, command)
    for pid, _ in command.marked():
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    code, out, err = command.finish()
    assert (code, err) == (130, "") and command.left_behind() == []
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert f"interrupted after iteration {int(checkpoint.name)}; go on with: python -m rl.run --resume" in out


@pytest.mark.slow
def test_a_run_whose_policy_and_then_driver_are_killed_ends_like_an_undisturbed_run(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "struck"
    command = Command(*SMALL_RUN, "--output", folder)
    wait_for(lambda: (folder / "checkpoints/000002/manifest.json").exists(), command)
    before = named(command, "Policy")
    assert strike(command, "Policy")
    wait_for(lambda: named(command, "Policy") not in ([], before), command)  # the run restarts the policy
    command.kill()
    # Ray needs some time to notice that a driver was killed.
    assert command.left_behind(patience=90) == []
    code, _, err = run("rl.run", "--resume", folder)
    assert code == 0, err
    assert_same(folder, finished[0])


def assert_same(folder: Path, calm: Path) -> None:
    """Asserts that two runs have the same metrics, samples, weights and optimizer state, bit for bit."""
    assert without_times(metrics(folder)) == without_times(metrics(calm))
    for part in ("policy", "checkpoints/000004"):
        for file in sorted((calm / part).rglob("*.safetensors")):
            ours, theirs = load_file(folder / file.relative_to(calm)), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file
    for file in sorted((calm / "rollouts").iterdir()):
        assert (folder / "rollouts" / file.name).read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that samples ahead. Policy and critic have two ranks each. The engine is killed once."""
    folder = tmp_path_factory.mktemp("runs") / "ahead"
    options = "iterations=3", "data.eval=[]", "learner.ranks=2", "rollout.max_staleness=1", "log.timeline=true"
    command = Command(*SMALL_RUN, *options, "learner.threads=1", "--output", folder)
    wait_for_iteration(folder, 1, command)
    assert strike(command, "Engine")
    code, out, err = command.finish()
    assert code == 0, err
    assert "engine 0 is replaced" in out
    assert command.left_behind() == []
    return folder


def test_an_engine_that_dies_is_replaced_and_every_sample_is_there(ahead: Path) -> None:
    assert sum(line["rollout/replaced_engines"] for line in metrics(ahead)[1:]) == 1
    assert [len(samples(ahead, iteration)) for iteration in (1, 2, 3)] == [8 * 4] * 3


def test_sampling_ahead_lags_one_update_behind_and_engine_and_learner_still_agree(ahead: Path) -> None:
    lines = metrics(ahead)[1:]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1]
    assert all(line["rollout/logprob_gap"] < 1e-4 for line in lines)
    assert all(0.9 < line["policy/tis_mean"] < 1.1 for line in lines)
    ids = [sample["id"] for iteration in (1, 2, 3) for sample in samples(ahead, iteration)]
    assert len(ids) == 3 * 8 * 4 and len(set(ids)) == 3 * 8  # each prompt is used once, with all 4 rollouts


def test_the_learner_encodes_each_picture_once(ahead: Path) -> None:
    # Each weight sync compares logprobs on prompts of the coming iteration. The sync after the last iteration uses
    # prompts of this last iteration. So the learner has encoded only pictures of the three iterations.
    assert sum(line.get("time/learner_encodings", 0) for line in metrics(ahead)) == len(pictures(ahead))


def pictures(folder: Path) -> set[str]:
    """Returns the distinct pictures in the samples of iterations 1 to 3."""
    found = set()
    for sample in [sample for iteration in (1, 2, 3) for sample in samples(folder, iteration)]:
        parts = [part for message in sample["messages"] for part in message["content"]]
        found |= {part["image"] for part in parts if isinstance(part, dict) and part["type"] == "image"}
    return found


def test_the_timeline_shows_samples_being_made_while_the_policy_learns(ahead: Path) -> None:
    events = json.loads((ahead / "timeline.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"loop", "samples ahead", "policy 0", "policy 1", "critic 0", "critic 1", "engine 0"} <= set(names.values())
    spans = [(names[e["pid"]], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    sampling = [(start, end) for who, what, start, end in spans if (who, what) == ("samples ahead", "rollout")]
    learning = [(start, end) for who, what, start, end in spans if (who, what) == ("policy 1", "update")]
    assert len(sampling) == 2 and len(learning) == 3
    critic = [(start, end) for who, what, start, end in spans if (who, what) == ("critic 0", "values")]
    assert any(a < end and start < b for a, b in sampling for start, end in learning + critic)


@pytest.mark.slow
def test_a_run_that_samples_ahead_loses_and_repeats_no_sample_when_it_is_interrupted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = Command(*SMALL_RUN, "iterations=8", "data.eval=[]", "rollout.max_staleness=1", "--output", folder)
    wait_for_iteration(folder, 2, command)
    command.interrupt()
    code, _, err = command.finish()
    assert code == 130, err
    assert command.left_behind() == []
    broken_off = len(metrics(folder))
    code, _, err = run("rl.run", "--resume", folder)
    assert code == 0, err
    assert [line["iteration"] for line in metrics(folder)] == list(range(9))
    # The interruption loses the samples that were made ahead. After the resume, these samples are made again, with the
    # newest weights.
    assert [line["rollout/staleness"] for line in metrics(folder)[1:]] == [
        0.0 if iteration in (1, broken_off) else 1.0 for iteration in range(1, 9)
    ]
    ids = [sample["id"] for iteration in range(1, 9) for sample in samples(folder, iteration)]
    assert len(ids) == 8 * 8 * 4 and len(set(ids)) == 8 * 8


@pytest.mark.slow
def test_a_run_whose_disk_is_full_stops_with_a_message_and_can_be_resumed(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", mib=60) as disk:  # room for two checkpoints, or for a checkpoint and the policy
        folder = disk / "run"
        code, out, err = run(*SMALL_RUN, "checkpoint.every=1", "--output", folder)
        assert code == 1, out
        assert f"{folder}/checkpoints has" in err and "takes about" in err and "--resume" in err
        assert len(metrics(folder)) > 1
        change(disk, "size=300m")
        code, _, err = run("rl.run", "--resume", folder)
        assert code == 0, err
        assert without_times(metrics(folder)) == without_times(metrics(finished[0]))


@pytest.mark.slow
def test_unfinished_responses_survive_an_interruption_bit_for_bit(tmp_path: Path) -> None:
    small = (*SMALL_RUN, "iterations=5", "data.eval=[]", "rollout.partial={extra_prompts: 0.5, chunk_tokens: 8}")
    code, _, err = run(*small, "--output", tmp_path / "whole")
    assert code == 0, err
    command = Command(*small, "--output", tmp_path / "broken")
    wait_for_iteration(tmp_path / "broken", 3, command)
    command.interrupt()
    code, _, err = command.finish()
    assert code == 130, err
    code, _, err = run("rl.run", "--resume", tmp_path / "broken")
    assert code == 0, err
    lines = metrics(tmp_path / "whole")
    assert max(line["response/continued_fraction"] for line in lines[1:]) > 0
    assert without_times(metrics(tmp_path / "broken")) == without_times(lines)
    ours, theirs = (load_file(tmp_path / name / "policy/model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_final_policy_gives_the_same_logprobs_in_vllm_and_in_our_code(finished: tuple[Path, str]) -> None:
    from rl.learner.options import LearnerOptions
    from rl.learner.policy import Policy
    from rl.recipe.resolve import load
    from rl.types import Request, Rollout
    from rollout.chat import Chat
    from tests.support.data_rows import read_rows

    folder = str(finished[0] / "policy")
    chat, rows = Chat(folder), read_rows(ROOT / "recipes/scale/data/heldout.jsonl")[::200]
    with engine(Path(folder), max_sequence_length=128) as started:
        answers = started.generate([Request(chat.prompt_ids(p), p.images, 24, seed) for seed, p in enumerate(rows)])
    made = [
        Rollout(p, "", a.finish, a.prompt_ids, a.response_ids, a.logprobs) for p, a in zip(rows, answers, strict=True)
    ]
    policy = Policy(folder, LearnerOptions.of(load(finished[0] / "recipe.yaml").config))
    features = {picture.digest: policy.encode(picture) for p in rows for picture in p.images}
    assert policy.logprob_gap(made, features) < 1e-4


def test_resuming_refuses_changed_values_and_names_them(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(finished[0]), "ppo.gamma=0.5", "iterations=9"]) == 2
    said = capsys.readouterr().err
    assert "ppo.gamma: 1.0 -> 0.5" in said and "iterations" not in said
    assert "--allow ppo.gamma" in said
    allowed = ["--resume", str(finished[0]), "ppo.gamma=0.5", "--allow", "ppo.gamma", "--dry-run"]
    assert main(allowed) == 0
    capsys.readouterr()
    assert main([*allowed, "--allow", "ppo.lamb"]) == 2
    assert "--allow ppo.lamb: the overrides do not change this option" in capsys.readouterr().err
    assert main([str(ROOT / "recipes/rlvr.yaml"), "--allow", "ppo.gamma"]) == 2
    assert "--allow is for --resume" in capsys.readouterr().err


def test_a_dry_run_prints_every_value_with_its_origin_and_starts_nothing(tmp_path: Path) -> None:
    code, out, err = run(*SMALL_RUN, "--dry-run", "--output", tmp_path / "none")
    assert code == 0, err
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["iterations"].endswith("command line")
    assert "profile cpu" in lines["model.path"]
    assert lines["ppo.tis_cap"].endswith("rlvr.yaml")
    assert "8 prompts x 4 rollouts = 32 per iteration" in out
    assert re.search(r"disk +up to 3 checkpoints of [\d.]+ MiB", out)
    assert not (tmp_path / "none").exists()


BAD_ROW = '{"id": "1", "task": "arithmetic", "messages": [{"role": "user", "content": "1+1"}], "ground_truth": "2"}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ppo.gama=1",), "did you mean ppo.gamma?"),
        (("ppo.gamma=high",), "ppo.gamma"),
        (("data.train={tmp}/none.jsonl",), "none.jsonl"),
        (("data.train={tmp}/bad.jsonl",), "bad.jsonl:2"),
        (("rewards.arithmetic={{use: math_verifi}}",), "math_verify"),
        (("rewards.arithmetic={{use: math_verify, penalties: [citatoin]}}",), "did you mean 'citation'"),
        (("ppo.kl=0.1",), "ppo.kl"),
        (("model.path={tmp}/holes",), "missing tensors"),
        (("max_sequence_length=20", "learner.token_budget=20"), "leave no room"),
    ],
)
def test_bad_input_gets_one_clear_message_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD_ROW + '{"id": "2", "task": "arithmetic"}\n')
    _model_with_a_hole(tmp_path / "holes")
    asked = [*map(str, SMALL_RUN[1:]), "--output", str(tmp_path / "run"), *(a.format(tmp=tmp_path) for a in arguments)]
    assert main(asked) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err
    assert said.out == "" and not (tmp_path / "run").exists()


def _model_with_a_hole(folder: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(ROOT / "recipes/scale/model", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def test_the_full_size_recipe_without_gpus_says_what_it_needs_and_names_the_cpu_profile() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    code, _, err = run("rl.run", ROOT / "recipes/rlvr.yaml")
    assert code == 2 and "--profile cpu" in err and "GPU" in err


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main([*map(str, SMALL_RUN[1:]), "--output", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_saved_checkpoint_is_a_whole_model_folder(finished: tuple[Path, str]) -> None:
    folder, start = finished[0] / "checkpoints/000002/policy", ROOT / "recipes/scale/model"
    assert {path.name for path in folder.iterdir()} >= {path.name for path in start.iterdir()}
    assert (folder / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    saved, before = hf_folder.load(folder).state_dict(), hf_folder.load(start).state_dict()  # load checks every tensor
    assert any(not torch.equal(saved[name], before[name]) for name in before)  # training has changed the weights
