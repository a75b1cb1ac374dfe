"""The runner: rewards in worker processes that hang, die and eat memory without hurting anyone else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rewards import async_pool
from rewards.endpoint import EndpointSpec
from rewards.runner import RewardRunner
from rl.config import Penalty, Reward
from rl.types import Finish, Prompt, Rollout
from tests.judge_server import Reply, judge_server

PLUGINS = '''
import asyncio, os, signal, subprocess, sys, time
from rewards import Invalid, Score, penalty, reward
from rewards.endpoint import Unreachable


@reward("obey")
def obey(rollout, gift: float = 1.0):
    """Does what the answer says, as a buggy reward might."""
    match rollout.answer.split():
        case ["hang"]:
            time.sleep(600)
        case ["spin"]:
            9 ** 9 ** 9 ** 9
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["exit"]:
            sys.exit("enough")
        case ["eat"]:
            return float(len([bytearray(1 << 24) for _ in range(1 << 20)]))
        case ["raise"]:
            return {}["nothing"]
        case ["refuse"]:
            raise Invalid("the judge is away")
        case ["return", what]:
            return eval(what)
        case ["child"]:
            return Score(0.5, {"pid": subprocess.Popen(["sleep", "600"]).pid})
        case ["print"]:
            print("to stdout, which must not disturb anything")
    return Score(gift, {"pid": os.getpid(), "hash": hash("x")})


@reward("obey_lowest", lowest=-1.0, on_timeout="lowest")
def obey_lowest(rollout):
    return obey(rollout)


@reward("die_once", on_timeout="lowest")
def die_once(rollout):
    if not os.path.exists(rollout.answer):
        open(rollout.answer, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


@reward("rank", group=True)
def rank(rollouts, unit: float = 0.1):
    if any(r.answer == "hang" for r in rollouts):
        time.sleep(600)
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].text))
    return [unit * order.index(i) for i in range(len(rollouts) - ("short" in rollouts[0].answer))]


@reward("slow_to_set_up")
class SlowToSetUp:
    def setup(self):
        time.sleep(1.5)

    async def __call__(self, rollout):
        await asyncio.sleep(0.01)
        return 0.75


@reward("waits")
async def waits(rollout):
    """Does what the answer says, while others wait beside it."""
    match rollout.answer.split():
        case ["sleep", seconds]:
            await asyncio.sleep(float(seconds))
        case ["hang"]:
            await asyncio.sleep(600)
        case ["block"]:
            time.sleep(600)
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["eat"]:
            return float(len([bytearray(1 << 24) for _ in range(1 << 20)]))
        case ["raise"]:
            return {}["nothing"]
        case ["tire"]:
            raise TimeoutError("its own patience is over")
        case ["patient" | "fragile" as kind, seen]:  # `seen` is a file that says how often it was asked
            with open(seen, "a") as file:
                file.write("x")
            if os.path.getsize(seen) == 1:
                raise Unreachable("judge", "not there yet")
            if kind == "fragile":
                os.kill(os.getpid(), signal.SIGKILL)
    return Score(0.25, {"pid": os.getpid()})


@penalty("rude")
def rude(rollout):
    return rollout.answer.count("!") / 2


@reward("signed", lowest=-1.0)
def signed(rollout):
    return 1.0


@reward("never_set_up")
class NeverSetUp:
    def setup(self):
        raise OSError("no model there")

    def __call__(self, rollout):
        return 1.0
'''


def spec(use: str, params: dict[str, Any] | None = None, **more: Any) -> Reward:
    return Reward.model_validate({"use": use, "params": params or {}, "timeout_s": 1.0, "memory_mb": 256, **more})


def penalty_spec(use: str, magnitude: float = 1.0) -> Penalty:
    return Penalty(use=use, magnitude=magnitude, timeout_s=1.0, memory_mb=256)


def rollout(text: str, task: str = "obey", prompt: str = "p", finish: Finish = "stop", truth: Any = "5") -> Rollout:
    return Rollout(Prompt(prompt, task, (), ground_truth=truth), text, finish)


TASKS = {
    "obey": [spec("plugins.py:obey", {"gift": 0.25})],
    "obey_lowest": [spec("plugins.py:obey_lowest")],
    "die_once": [spec("plugins.py:die_once")],
    "rank": [spec("plugins.py:rank")],
    "slow": [spec("plugins.py:slow_to_set_up")],
    "waits": [spec("plugins.py:waits")],
    "math": [spec("math_verify", timeout_s=2.0)],
    "exact": [spec("exact")],
    "sum": [
        spec("plugins.py:obey", {"gift": 0.5}, weight=0.8, penalties=(penalty_spec("plugins.py:rude", 0.5),)),
        spec("exact", weight=0.2),
        spec("plugins.py:rank", {"unit": 1.0}, weight=-0.1),
    ],
    "signed": [spec("plugins.py:signed", penalties=(penalty_spec("plugins.py:rude"),))],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    path.joinpath("plugins.py").write_text(PLUGINS)
    return path


@pytest.fixture(scope="module")
def runner(folder: Path) -> Iterator[RewardRunner]:
    with RewardRunner(TASKS, folder, workers=2) as made:
        yield made


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [c for c in children if c.status() != psutil.STATUS_ZOMBIE and "rewards.worker" in str(c.cmdline())]


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
        ("return -0.5", "declare it: @reward('obey', lowest=...)"),
        ("return Score(1,{'x':{1}})", "can't be written as JSON"),
    ],
)
def test_what_goes_wrong_around_the_model_makes_its_sample_invalid_and_no_other(
    runner: RewardRunner, text: str, why: str
) -> None:
    good, bad, also_good = runner.score([rollout("fine"), rollout(text), rollout("fine")])
    assert bad.invalid is not None
    assert bad.invalid.startswith("reward obey: ")
    assert why in bad.invalid
    assert (good.reward, good.invalid, also_good.reward, also_good.invalid) == (0.25, None, 0.25, None)


@pytest.mark.parametrize(("text", "why"), [("hang", "1 s"), ("eat", "MemoryError"), ("die", "SIGKILL")])
def test_a_reward_may_declare_that_running_out_of_time_or_memory_is_the_texts_fault(
    runner: RewardRunner, text: str, why: str
) -> None:
    (scored,) = runner.score([rollout(text, task="obey_lowest")])
    assert (scored.reward, scored.invalid) == (-1.0, None)
    assert why in scored.details["why"]


def test_a_process_that_dies_by_chance_does_not_cost_its_sample_the_reward(
    runner: RewardRunner, tmp_path: Path
) -> None:
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
    start = time.monotonic()
    (scored,) = runner.score([rollout(text, task="math")])
    assert (scored.reward, scored.invalid) == (0.0, None)
    assert time.monotonic() - start < 6.0


def test_nested_mathematics_that_is_right_is_right(runner: RewardRunner) -> None:
    (scored,) = runner.score([rollout(r"\boxed{\frac{10}{2}}", task="math")])
    assert scored.reward == 1.0


def test_a_truncated_response_gets_the_lowest_value_and_its_reward_never_runs(runner: RewardRunner) -> None:
    start = time.monotonic()
    (scored,) = runner.score([rollout("hang", task="obey_lowest", finish="length")])
    assert (scored.reward, scored.invalid, scored.details) == (-1.0, None, {"truncated": True})
    assert time.monotonic() - start < 0.9


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


def test_a_group_reward_cannot_be_submitted_one_by_one(runner: RewardRunner) -> None:
    assert (runner.is_group("rank"), runner.is_group("obey")) == (True, False)
    with pytest.raises(ValueError, match="submit_group"):
        runner.submit(rollout("x", task="rank"))


def test_setting_up_and_awaiting_do_not_count_as_scoring_time(runner: RewardRunner) -> None:
    (scored,) = runner.score([rollout("", task="slow")])  # its setup takes 1.5 s, its limit is 1 s
    assert (scored.reward, scored.invalid) == (0.75, None)


def test_one_hung_sample_does_not_hold_up_the_others(runner: RewardRunner) -> None:
    hung = runner.submit(rollout("hang"))
    others = [runner.submit(rollout("fine")) for _ in range(10)]
    assert all(other.result().reward == 0.25 for other in others)
    assert not hung.done()
    assert hung.result().invalid


def test_every_worker_scores_alike(runner: RewardRunner) -> None:
    details = [s.details for s in runner.score([rollout("fine") for _ in range(40)])]
    assert len({d["hash"] for d in details}) == 1


def test_lowest_and_highest_are_what_the_reward_declares(runner: RewardRunner) -> None:
    assert (runner.lowest("obey_lowest"), runner.highest("obey_lowest")) == (-1.0, 1.0)


def test_a_row_whose_task_has_no_reward_is_named_together_with_the_tasks_there_are(
    runner: RewardRunner,
) -> None:
    with pytest.raises(ValueError, match="row 'p7': task 'chess' has no reward; the recipe has rewards for obey"):
        runner.check_rows([Prompt("p1", "obey", ()), Prompt("p7", "chess", ())])


def test_rows_without_what_their_reward_compares_with_are_listed(runner: RewardRunner) -> None:
    rows = [Prompt("p1", "exact", (), ground_truth="5"), Prompt("p2", "exact", ()), Prompt("p3", "obey", ())]
    with pytest.raises(ValueError, match=r"1 row\(s\) .*\n  row 'p2' has no ground_truth, which exact \(task exact\)"):
        runner.check_rows(rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (spec("exact", {"limit": 1}), "rewards.t: reward 'exact' has no parameter 'limit'"),
        (spec("exakt"), "rewards.t: no reward is called 'exakt'"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_before_anything_starts(given: Reward, said: str) -> None:
    before = workers()
    with pytest.raises(ValueError, match=said):
        RewardRunner({"t": [given]})
    assert workers() == before


def test_warming_up_says_how_long_it_took_or_which_setup_failed(folder: Path) -> None:
    with RewardRunner({"slow": [spec("plugins.py:slow_to_set_up")]}, folder, workers=1) as slow:
        assert 1.5 < slow.warm().result() < 10.0
    with RewardRunner({"t": [spec("plugins.py:never_set_up")]}, folder, workers=1) as broken:
        with pytest.raises(RuntimeError, match=r"reward never_set_up: .*no model there"):
            broken.warm().result()
        (scored,) = broken.score([rollout("", task="t")])
        assert scored.invalid
        assert "OSError: no model there (plugins.py:" in scored.invalid


def test_closing_leaves_no_process_behind_not_even_a_hung_one_or_its_children(folder: Path) -> None:
    before = workers()
    made = RewardRunner({"obey": TASKS["obey"]}, folder, workers=2)
    child = made.score([rollout("child")])[0].details["pid"]
    hung, queued = made.submit(rollout("hang")), [made.submit(rollout("hang")) for _ in range(5)]
    time.sleep(0.1)
    assert len(workers()) >= len(before) + 2
    made.close()
    assert workers() == before
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert all(f.cancelled() or f.exception() for f in (hung, *queued))
    with pytest.raises(RuntimeError, match="closed"):
        made.submit(rollout("fine"))


PARENT = """
import sys
sys.path[:0] = {path!r}
from tests.test_reward_runner import RewardRunner, rollout, spec
runner = RewardRunner({{"obey": [spec("plugins.py:obey", timeout_s=300)]}}, {folder!r}, workers=2)
print(runner.score([rollout("fine")])[0].details["pid"], flush=True)
runner.submit(rollout("spin")), runner.submit(rollout("hang"))
{then}
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_end_with_their_parent_even_when_they_hang(folder: Path, end: str) -> None:
    then = "import time; time.sleep(0.5 if {} else 600)".format(end == "exit")
    code = PARENT.format(path=[str(Path(__file__).parents[1])], folder=str(folder), then=then)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    assert int(parent.stdout.readline())
    time.sleep(0.3)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    if end == "kill":
        os.kill(parent.pid, signal.SIGKILL)
    assert parent.wait(timeout=20) == (0 if end == "exit" else -signal.SIGKILL)
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


# Several rewards and penalties


def test_a_task_may_sum_weighted_rewards_and_its_penalties_take_from_the_reward_they_stand_under(
    runner: RewardRunner,
) -> None:
    calm, rude = [rollout("5", task="sum"), rollout("5!", task="sum")]
    first, second = runner.score([calm, rude])
    # 0.8 * 0.5 + 0.2 * 1 - 0.1 * 0 (shortest); then "5!" is half an offence, of which half counts: 0.8 * 0.5 * 0.75,
    # is not exactly 5, and second in length
    assert first.reward == pytest.approx(0.6)
    assert first.parts == {"obey": 0.5, "rude": 0.0, "exact": 1.0, "rank": 0.0}
    assert second.reward == pytest.approx(0.3 - 0.1)
    assert second.parts == {"obey": 0.5, "rude": 0.5, "exact": 0.0, "rank": 1.0}
    assert set(first.details) == {"obey", "exact"} and first.details["exact"] == {"answer": "5"}


def test_the_bounds_of_a_sum_are_those_of_its_parts_with_their_weights(runner: RewardRunner) -> None:
    assert (runner.lowest("sum"), runner.highest("sum")) == pytest.approx((-0.1, 1.0))


def test_a_full_offence_takes_a_reward_to_its_lowest_value_even_below_zero(runner: RewardRunner) -> None:
    scored = runner.score([rollout(text, task="signed") for text in ("", "!", "!!")])
    assert [one.reward for one in scored] == [1.0, 0.0, -1.0]


def test_a_sample_is_invalid_if_any_of_its_parts_is(runner: RewardRunner) -> None:
    dead, offended = runner.score([rollout("die", task="sum", prompt="a"), rollout("!!!", task="sum", prompt="b")])
    assert dead.invalid == "reward obey: its process was killed by SIGKILL"
    assert offended.invalid == "penalty rude: returned 1.5; a penalty is between 0 (no offence) and 1"


@pytest.mark.parametrize("given", [spec("plugins.py:rude"), spec("exact", penalties=(penalty_spec("exact"),))])
def test_a_penalty_is_no_reward_and_a_reward_no_penalty(folder: Path, given: Reward) -> None:
    with pytest.raises(ValueError, match=r"is a (penalty|reward) and belongs under (penalties|rewards)"):
        RewardRunner({"t": [given]}, folder)


# A batch that is scored while it is sampled


def test_rollouts_may_come_in_any_order_and_groups_wait_for_their_last(runner: RewardRunner) -> None:
    rollouts = [rollout("x" * n, task="rank", prompt="a") for n in (3, 1)] + [rollout("fine"), rollout("print")]
    scoring = runner.begin(per_prompt=2)
    for place in (3, 1, 2, 0):
        scoring.add(place, rollouts[place])
    scored = scoring.results()
    assert [one.rollout for one in scored] == rollouts
    assert [one.reward for one in scored] == [0.1, 0.0, 0.25, 0.25]


def test_a_group_that_never_became_complete_is_told(runner: RewardRunner) -> None:
    scoring = runner.begin(per_prompt=2)
    scoring.add(0, rollout("x", task="rank"))
    with pytest.raises(ValueError, match="1 prompts have not all of their 2 rollouts yet"):
        scoring.results()


# Hung samples


def test_a_hung_sample_gives_its_turn_to_a_reserve_process(folder: Path) -> None:
    with RewardRunner({"obey": [spec("plugins.py:obey", timeout_s=20.0)]}, folder, workers=1) as single:
        single.score([rollout("fine")])
        hung = single.submit(rollout("spin"))
        assert [one.reward for one in single.score([rollout("fine") for _ in range(20)])] == [1.0] * 20
        assert not hung.done()


# Rewards that wait


def test_async_rewards_wait_side_by_side_in_one_process(runner: RewardRunner) -> None:
    start = time.monotonic()
    scored = runner.score([rollout("sleep 0.5", task="waits", truth=str(i)) for i in range(40)])
    assert {one.reward for one in scored} == {0.25} and len({one.details["pid"] for one in scored}) == 1
    assert time.monotonic() - start < 5.0  # one after the other they would take 20 s


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hang", "took longer than 1 s"),
        ("raise", "KeyError: 'nothing' (plugins.py:"),
        ("tire", "TimeoutError: its own patience is over (plugins.py:"),
        ("die", "its process was killed by SIGKILL"),
        ("eat", "its process ended with exit code 3"),
        ("block", "it blocked the event loop for "),
    ],
)
def test_an_async_reward_that_fails_costs_only_its_own_sample(runner: RewardRunner, text: str, why: str) -> None:
    others = [rollout("sleep 0.2", task="waits", truth=f"{text}{i}") for i in range(6)]
    scored = runner.score([*others[:3], rollout(text, task="waits"), *others[3:]])
    assert scored[3].invalid and why in scored[3].invalid
    assert [(one.reward, one.invalid) for one in scored if one is not scored[3]] == [(0.25, None)] * 6


def test_the_same_question_about_the_same_response_is_asked_once(runner: RewardRunner) -> None:
    start = time.monotonic()
    for _ in range(2):
        scored = runner.score([rollout("sleep 0.8", task="waits", prompt=str(i)) for i in range(3)])
        assert [one.rollout.prompt.id for one in scored] == ["0", "1", "2"]
    assert time.monotonic() - start < 1.6


# Endpoints that stay away


def asking(url: str, max_wait_s: float) -> RewardRunner:
    """A runner whose task `t` asks a judge that is tried once and then counts as away."""
    judge = EndpointSpec("judge", url, "m", retries=0, max_wait=max_wait_s)
    specs = {"t": [spec("verifier", {"endpoint": "judge"}, timeout_s=None)]}
    return RewardRunner(specs, endpoints={"judge": judge})


def test_samples_wait_for_a_judge_that_is_away_and_the_outage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.2, 0.5))
    told: list[async_pool.Outage] = []
    right = {"reasoning": "equal", "verdict": "correct"}
    away = [Reply("busy", status=503)] * 6
    with judge_server([*away, right]) as server, asking(server.url, max_wait_s=60) as asks:
        asks.on_outage = told.append
        scored = asks.score([rollout(str(i), task="t", truth=str(i)) for i in range(4)])
    assert [(one.reward, one.invalid) for one in scored] == [(1.0, None)] * 4
    assert [outage.why is None for outage in told] == [False, True]
    assert "HTTP 503: busy" in str(told[0].why) and told[1].seconds > 0.2


def test_waiting_for_a_judge_ends_after_its_max_wait_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.2, 0.5))
    with (
        judge_server([Reply("busy", status=503)]) as server,
        asking(server.url, max_wait_s=1) as asks,
        pytest.raises(async_pool.EndpointAway, match=r"endpoint 'judge' has not answered for \d+ s.*HTTP 503"),
    ):
        asks.score([rollout(str(i), task="t", truth=str(i)) for i in range(4)])


def test_a_probe_that_dies_does_not_strand_what_waits_for_the_endpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.2, 0.5))
    away = EndpointSpec("judge", "http://127.0.0.1:9/v1", "m", max_wait=30)
    answers = [f"{kind} {tmp_path / kind}" for kind in ("fragile", "patient")]
    with RewardRunner({"t": [spec("plugins.py:waits")]}, folder, endpoints={"judge": away}) as waiting:
        fragile, patient = waiting.score([rollout(answer, task="t") for answer in answers])
    assert fragile.invalid == "reward waits: its process was killed by SIGKILL"
    assert (patient.reward, patient.invalid) == (0.25, None)


def test_an_endpoint_the_recipe_does_not_have_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"asks the endpoint 'jugde', .* add it under"):
        RewardRunner({"t": [spec("verifier", {"endpoint": "jugde"})]})
