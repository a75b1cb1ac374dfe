"""Tests the runner: rewards that hang, die or use too much memory do not affect other samples."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rewards.running.runner import RewardRunner
from rl.config import RewardSpec
from rl.types import Prompt
from tests.support.patience import at_most
from tests.support.reward_plugins import ROW_JUDGES, TASKS, rollout, spec


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [c for c in children if c.status() != psutil.STATUS_ZOMBIE and "rewards.running.worker" in str(c.cmdline())]


def test_order_is_kept_and_the_parameters_reach_the_reward(runner: RewardRunner) -> None:
    rollouts = [rollout(str(i), task="exact", truth=str(i % 2)) for i in range(20)] + [rollout("print")]
    scored = runner.score(rollouts)
    assert [s.rollout for s in scored] == rollouts
    assert [s.reward for s in scored] == [1.0, 1.0] + [0.0] * 18 + [0.25]
    assert scored[0].parts == {"exact": 1.0}
    assert scored[0].details == {"answer": "0"}
    assert scored[0].invalid is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hang", "took longer than 1 s"),
        ("spin", "took longer than 1 s"),
        ("die", "its process was killed by SIGKILL"),
        ("exit", "SystemExit: enough (plugins.py:"),
        ("eat", "MemoryError"),
        ("raise", "KeyError: 'nothing' (plugins.py:"),
        ("refuse", "the judge is away"),
        ("return None", "returned None, which is no number"),
        ("return float('nan')", "returned nan"),
        ("return -0.5", "declare the lowest value that the reward can return: @reward('obey', lowest=...)"),
        ("return Score(1,{'x':{1}})", "can't be written as JSON"),
    ],
)
def test_a_reward_that_fails_makes_its_sample_invalid_and_no_other(runner: RewardRunner, text: str, why: str) -> None:
    good, bad, also_good = runner.score([rollout("fine"), rollout(text), rollout("fine")])
    assert bad.invalid is not None
    assert bad.invalid.startswith("reward obey: ")
    assert why in bad.invalid
    assert (good.reward, good.invalid, also_good.reward, also_good.invalid) == (0.25, None, 0.25, None)


@pytest.mark.parametrize(("text", "why"), [("hang", "1 s"), ("eat", "MemoryError"), ("die", "SIGKILL")])
def test_with_on_timeout_lowest_running_out_of_time_or_memory_scores_the_lowest_value(
    runner: RewardRunner, text: str, why: str
) -> None:
    (scored,) = runner.score([rollout(text, task="obey_lowest")])
    assert (scored.reward, scored.invalid) == (-1.0, None)
    assert why in scored.details["why"]


def test_a_sample_is_scored_again_after_its_process_died_once(runner: RewardRunner, tmp_path: Path) -> None:
    (scored,) = runner.score([rollout(str(tmp_path / "died"), task="die_once")])
    assert (scored.reward, scored.invalid) == (1.0, None)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9^{9^{9^9}}}",
        "9^9^9^9",
        r"\boxed{" + r"\frac{1}{" * 200 + "5" + "}" * 201,
        r"\boxed{" + "(" * 900 + "5" + ")" * 900 + "}",
        r"\boxed{10000000!}",
        r"$\int_0^1 x^{x^{x^x}} dx$",
        "$" * (1 << 20),
    ],
)
def test_hostile_mathematics_scores_the_lowest_value_in_bounded_time(runner: RewardRunner, text: str) -> None:
    with at_most(6):
        (scored,) = runner.score([rollout(text, task="math")])
        assert (scored.reward, scored.invalid) == (0.0, None)


def test_right_nested_mathematics_scores_one(runner: RewardRunner) -> None:
    (scored,) = runner.score([rollout(r"\boxed{\frac{10}{2}}", task="math")])
    assert scored.reward == 1.0


def test_a_truncated_response_gets_the_lowest_value_and_its_reward_never_runs(runner: RewardRunner) -> None:
    with at_most(0.9):
        (scored,) = runner.score([rollout("hang", task="obey_lowest", finish="length")])
        assert (scored.reward, scored.invalid, scored.details) == (-1.0, None, {"truncated": True})


def test_a_group_reward_sees_all_rollouts_of_one_prompt_and_only_those(runner: RewardRunner) -> None:
    a = [rollout("x" * n, task="rank", prompt="a") for n in (3, 1, 2)]
    b = [rollout("x" * n, task="rank", prompt="b") for n in (1, 2)]
    scored = runner.score([a[0], b[0], a[1], b[1], a[2]])
    assert [s.reward for s in scored] == pytest.approx([0.2, 0.0, 0.0, 0.1, 0.1])


def test_a_truncated_member_of_a_group_gets_the_lowest_value(runner: RewardRunner) -> None:
    scored = runner.score([rollout("x", task="rank"), rollout("xx", task="rank", finish="length")])
    assert [(s.reward, s.details) for s in scored] == [(0.0, {}), (0.0, {"truncated": True})]


@pytest.mark.parametrize(("text", "why"), [("hang", "took longer than 2 s"), ("short", "1 scores for a group of 2")])
def test_a_group_that_cannot_be_scored_is_invalid_as_a_whole(runner: RewardRunner, text: str, why: str) -> None:
    scored = runner.score([rollout(text, task="rank"), rollout(text, task="rank")])
    assert all(s.invalid and why in s.invalid for s in scored)


@pytest.mark.parametrize("task", ["rank", "obey"])
def test_a_rollout_whose_picture_was_lost_is_invalid_without_being_scored(runner: RewardRunner, task: str) -> None:
    lost = replace(rollout("", task=task), unusable="picture 12 cannot be read")
    scored = runner.score([lost, rollout("x", task=task)])
    assert scored[0].invalid == "picture 12 cannot be read"
    assert (scored[1].invalid is None) == (task == "obey")  # a group is scored as a whole


def test_a_group_reward_cannot_be_submitted_one_by_one(runner: RewardRunner) -> None:
    assert (runner.is_group("rank"), runner.is_group("obey")) == (True, False)
    with pytest.raises(ValueError, match="submit_group"):
        runner.submit(rollout("x", task="rank"))


def test_setup_does_not_count_against_the_time_limit(runner: RewardRunner) -> None:
    (scored,) = runner.score([rollout("", task="slow")])  # the setup takes 1.5 s, the time limit is 1 s
    assert (scored.reward, scored.invalid) == (0.75, None)


def test_one_hung_sample_does_not_delay_the_others(runner: RewardRunner) -> None:
    hung = runner.submit(rollout("hang"))
    others = [runner.submit(rollout("fine")) for _ in range(10)]
    assert all(other.result().reward == 0.25 for other in others)
    assert not hung.done()
    assert hung.result().invalid


def test_every_worker_has_the_same_hash_seed(runner: RewardRunner) -> None:
    details = [s.details for s in runner.score([rollout("fine") for _ in range(40)])]
    assert len({d["hash"] for d in details}) == 1


def test_lowest_and_highest_are_what_the_reward_declares(runner: RewardRunner) -> None:
    assert (runner.lowest("obey_lowest"), runner.highest("obey_lowest")) == (-1.0, 1.0)


def test_a_row_whose_task_has_no_reward_is_a_problem_that_lists_the_known_tasks(
    runner: RewardRunner,
) -> None:
    assert runner.problem(Prompt("p1", "obey", ())) is None
    why = runner.problem(Prompt("p7", "chess", ()))
    assert why and why.startswith("task 'chess' has no reward; the recipe has rewards for obey")


def test_a_row_without_the_ground_truth_that_its_reward_needs_is_a_problem(runner: RewardRunner) -> None:
    rows = [Prompt("p1", "exact", (), ground_truth="5"), Prompt("p2", "exact", ()), Prompt("p3", "obey", ())]
    assert [runner.problem(row) for row in rows] == [
        None,
        "row 'p2' has no ground_truth, which exact (task exact) needs",
        None,
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (spec("exact", {"limit": 1}), "rewards.t: reward 'exact' has no parameter 'limit'"),
        (spec("exakt"), "rewards.t: no reward is called 'exakt'"),
    ],
)
def test_an_unknown_reward_or_parameter_is_refused_before_any_process_starts(given: RewardSpec, said: str) -> None:
    before = workers()
    with pytest.raises(ValueError, match=said):
        RewardRunner({"t": [given]})
    assert workers() == before


def test_start_returns_the_seconds_or_names_the_reward_whose_setup_failed(plugins: Path) -> None:
    with RewardRunner({"slow": [spec("plugins.py:slow_to_set_up")]}, plugins, workers=1) as slow:
        assert 1.5 < slow.start().result() < 10.0
    with RewardRunner({"t": [spec("plugins.py:never_set_up")]}, plugins, workers=1) as broken:
        with pytest.raises(RuntimeError, match=r"reward never_set_up: .*no model there"):
            broken.start().result()
        (scored,) = broken.score([rollout("", task="t")])
        assert scored.invalid
        assert "OSError: no model there (plugins.py:" in scored.invalid


def test_closing_ends_all_processes_including_hung_ones_and_their_children(plugins: Path) -> None:
    before = workers()
    made = RewardRunner({"obey": TASKS["obey"]}, plugins, workers=2)
    child = made.score([rollout("child")])[0].details["pid"]
    hung, queued = made.submit(rollout("hang")), [made.submit(rollout("hang")) for _ in range(5)]
    time.sleep(0.1)
    assert len(workers()) - len(before) in (2, 3)  # 2 workers, and the reserve process if it has already started
    made.close()
    assert workers() == before
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert all(f.cancelled() or f.exception() for f in (hung, *queued))
    with pytest.raises(RuntimeError, match="closed"):
        made.submit(rollout("fine"))


PARENT = """
import sys
sys.path[:0] = {path!r}
from rewards.running.runner import RewardRunner
from tests.support.reward_plugins import rollout, spec
runner = RewardRunner({{"obey": [spec("plugins.py:obey", timeout_s=300)]}}, {plugins!r}, workers=2)
print(runner.score([rollout("fine")])[0].details["pid"], flush=True)
runner.submit(rollout("spin")), runner.submit(rollout("hang"))
{then}
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_end_with_their_parent_even_when_they_hang(plugins: Path, end: str) -> None:
    then = "import time; time.sleep(0.5 if {} else 600)".format(end == "exit")
    code = PARENT.format(path=[str(Path(__file__).parents[3])], plugins=str(plugins), then=then)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    assert int(parent.stdout.readline())
    time.sleep(0.3)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) in (2, 3)  # 2 workers, and the reserve process if it has already started
    if end == "kill":
        os.kill(parent.pid, signal.SIGKILL)
    assert parent.wait(timeout=20) == (0 if end == "exit" else -signal.SIGKILL)
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


# Row judges


def data_row(truth: str, identity: str = "row-1") -> Prompt:
    return Prompt(identity, "sums", (), ground_truth=truth)


def test_a_row_judge_gets_the_row_itself(runner: RewardRunner) -> None:
    (score,) = runner.results([runner.submit_row(data_row("fine"), "judge_row")])
    assert (score.value, score.invalid, score.details) == (0.25, None, {"id": "row-1", "task": "sums"})


@pytest.mark.parametrize(
    ("truth", "why"),
    [
        ("hang", "took longer than 1 s"),
        ("raise", "KeyError: 'nothing' (plugins.py:"),
        ("return 1.5", "returned 1.5; the value of a row judge must be between 0 and 1"),
        ("return -0.5", "returned -0.5; the value of a row judge must be between 0 and 1"),
    ],
)
def test_a_row_judge_that_fails_makes_its_row_invalid_and_no_other(runner: RewardRunner, truth: str, why: str) -> None:
    rows = [data_row("fine"), data_row(truth), data_row("fine")]
    good, bad, also_good = runner.results([runner.submit_row(row, "judge_row") for row in rows])
    assert bad.invalid and bad.invalid.startswith(f"row judge judge_row: {why}")
    assert (good.value, good.invalid, also_good.value, also_good.invalid) == (0.25, None, 0.25, None)


def test_the_same_question_about_the_same_row_is_asked_once(runner: RewardRunner, tmp_path: Path) -> None:
    asked = [data_row(str(tmp_path / "asked"), identity) for identity in ("row-1", "row-2")]
    first, second = runner.results([runner.submit_row(row, "wait_for_row") for row in asked])
    assert (first.value, second.value, (tmp_path / "asked").read_text()) == (1.0, 1.0, "x")


def test_closing_cancels_rows_that_are_not_judged_yet(plugins: Path) -> None:
    made = RewardRunner({}, plugins, workers=1, row_judges=ROW_JUDGES)
    scores = [made.submit_row(data_row("hang"), "judge_row") for _ in range(3)]
    made.close()
    assert all(score.cancelled() or score.exception() for score in scores)


# Hung samples


def test_a_hung_sample_gives_its_turn_to_a_reserve_process(plugins: Path) -> None:
    with RewardRunner({"obey": [spec("plugins.py:obey", timeout_s=20.0)]}, plugins, workers=1) as single:
        single.score([rollout("fine")])
        hung = single.submit(rollout("spin"))
        assert [one.reward for one in single.score([rollout("fine") for _ in range(20)])] == [1.0] * 20
        assert not hung.done()
