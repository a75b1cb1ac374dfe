"""Tests async rewards: they run concurrently, and an endpoint that does not answer delays only its own samples."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewards.endpoint import EndpointSpec
from rewards.running import async_pool
from rewards.running.runner import RewardRunner
from tests.support.command import wait_until
from tests.support.judge_server import Reply, judge_server, text_of
from tests.support.patience import at_most
from tests.support.reward_plugins import rollout, spec

# Async rewards


def test_async_rewards_run_concurrently_in_one_process(runner: RewardRunner) -> None:
    with at_most(5):  # the 40 rewards would take 20 s if they ran one after the other
        scored = runner.score([rollout("sleep 0.5", task="waits", truth=str(i)) for i in range(40)])
        assert {one.reward for one in scored} == {0.25} and len({one.details["pid"] for one in scored}) == 1


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
    others = [rollout("sleep 0.2", task="waits", truth=f"{text}{i}") for i in range(4)]
    scored = runner.score([*others[:2], rollout(text, task="waits"), *others[2:]])
    assert scored[2].invalid and why in scored[2].invalid
    assert [(one.reward, one.invalid) for one in scored if one is not scored[2]] == [(0.25, None)] * 4


def test_thousands_of_rewards_that_return_at_once_are_scored(runner: RewardRunner) -> None:
    with at_most(30):  # if both processes waited for each other to read, this would take for ever
        scored = runner.score([rollout("now", task="waits", truth=str(i)) for i in range(4000)])
    assert {one.reward for one in scored} == {0.25}


def test_large_samples_reach_a_process_that_a_reward_blocks_and_cost_only_this_reward(runner: RewardRunner) -> None:
    large = [rollout("x" * (4 << 20), task="waits", truth=f"large {i}") for i in range(3)]
    blocked, *others = runner.score([rollout("block", task="waits", truth="large"), *large])
    assert "it blocked the event loop" in str(blocked.invalid)
    assert [one.reward for one in others] == [0.25] * 3


def test_only_a_bounded_number_of_bytes_is_in_the_process(
    runner: RewardRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_pool, "MOST_BYTES", 100_000)
    texts = [f"sleep 0.3 {'x' * 60_000}{i}" for i in range(4)]
    with at_most(20):
        scored = runner.score([rollout(text, task="waits") for text in texts])
    assert [one.invalid for one in scored] == [None] * 4


def test_the_same_question_about_the_same_response_is_asked_once(runner: RewardRunner) -> None:
    with at_most(1.6):  # if each round asked again, the five rounds would take 4 s
        for _ in range(5):
            scored = runner.score([rollout("sleep 0.8", task="waits", prompt=str(i)) for i in range(3)])
            assert [one.rollout.prompt.id for one in scored] == ["0", "1", "2"]


def test_judgements_are_stored_without_their_rollouts(runner: RewardRunner) -> None:
    rollouts = [rollout("sleep 0", task="waits", truth=f"stored {i}") for i in range(20)]
    alive = [weakref.ref(one) for one in rollouts]
    pids = {one.details["pid"] for one in runner.score(rollouts)}
    rollouts.clear()
    gc.collect()
    assert [one() for one in alive] == [None] * 20
    again = runner.score([rollout("sleep 0", task="waits", truth=f"stored {i}") for i in range(20)])
    assert [one.reward for one in again] == [0.25] * 20 and {one.details["pid"] for one in again} == pids


# Endpoints that do not answer


def asking(url: str, max_wait_s: float) -> RewardRunner:
    """Returns a runner whose task `t` asks a judge. No request is retried, so one failed request is an outage."""
    judge = EndpointSpec("judge", url, "m", retries=0, max_wait=max_wait_s)
    specs = {"t": [spec("verifier", {"endpoint": "judge"}, timeout_s=None)]}
    return RewardRunner(specs, endpoints={"judge": judge})


def test_samples_wait_for_a_judge_that_does_not_answer_and_the_outage_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_after_max_wait_the_samples_fail_with_the_endpoints_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.2, 0.5))
    with (
        judge_server([Reply("busy", status=503)]) as server,
        asking(server.url, max_wait_s=1) as asks,
        pytest.raises(async_pool.EndpointAway, match=r"endpoint 'judge' has not answered for \d+ s.*HTTP 503"),
    ):
        asks.score([rollout(str(i), task="t", truth=str(i)) for i in range(4)])


PLAIN = """
from pydantic import BaseModel
from rewards import reward
from rewards.endpoint import EndpointName, endpoint

class Number(BaseModel):
    value: float

@reward("asks", timeout_s=None)
class Asks:
    def __init__(self, judge: EndpointName):
        self.name = judge

    def setup(self):
        self.judge = endpoint(self.name)

    async def __call__(self, rollout):
        messages = [{"role": "user", "content": rollout.text}]
        number, _ = await self.judge.ask(messages, answer=Number, max_tokens=8, temperature=0.0, seed=0)
        return number.value
"""


def test_a_sample_on_which_an_endpoint_always_fails_is_invalid_while_the_endpoint_answers_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.1, 0.2))
    (tmp_path / "plain.py").write_text(PLAIN)

    def reply(request: dict[str, Any]) -> Reply:
        if "poison" in text_of(request):
            return Reply(status=500, after_s=0.1)
        return Reply({"value": 0.5}, after_s=0.1)

    texts = ["poison", *(f"good {i}" for i in range(100))]
    with judge_server(reply) as server:
        judge = EndpointSpec("judge", server.url, "m", retries=0, max_wait=30, concurrency=4)
        asks = spec("plain.py:asks", {"judge": "judge"})
        with RewardRunner({"t": [asks]}, tmp_path, endpoints={"judge": judge}) as runner:
            poison, *good = runner.score([rollout(text, task="t") for text in texts])
    assert [one.reward for one in good] == [0.5] * 100
    assert poison.invalid and "endpoint judge answers other samples, but not this: HTTP 500" in poison.invalid


def test_an_outage_in_the_middle_of_a_batch_makes_no_sample_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.1, 0.2))
    (tmp_path / "plain.py").write_text(PLAIN)
    told: list[async_pool.Outage] = []
    answers = [Reply({"value": 0.5}, after_s=0.05)] * 10
    with judge_server([*answers, *[Reply(status=503)] * 50, answers[0]]) as server:
        judge = EndpointSpec("judge", server.url, "m", retries=0, max_wait=60, concurrency=4)
        asks = spec("plain.py:asks", {"judge": "judge"})
        with RewardRunner({"t": [asks]}, tmp_path, endpoints={"judge": judge}) as runner:
            runner.on_outage = told.append
            scored = runner.score([rollout(f"good {i}", task="t") for i in range(40)])
    assert [(one.reward, one.invalid) for one in scored] == [(0.5, None)] * 40
    # Answers that were under way when the first request failed can end the first outage, and a second one begins.
    ends = [outage.why is None for outage in told if not outage.again]
    assert ends and ends == [False, True] * (len(ends) // 2)


def test_an_outage_ends_when_the_endpoint_answers_any_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (60.0, 60.0))  # no probe is sent during the test
    told: list[async_pool.Outage] = []
    right = {"reasoning": "equal", "verdict": "correct"}
    with judge_server([Reply(status=503)] * 2 + [Reply(right, after_s=1)]) as server, asking(server.url, 50) as asks:
        asks.on_outage = told.append
        with ThreadPoolExecutor() as threads:
            first = threads.submit(asks.score, [rollout("1", task="t", truth="1")])
            wait_until(lambda: bool(told))
            second = threads.submit(asks.score, [rollout("2", task="t", truth="2")])
            assert [scores.result()[0].reward for scores in (first, second)] == [1.0, 1.0]
    assert [outage.why is None for outage in told] == [False, True]


def test_samples_that_wait_for_an_endpoint_go_on_after_a_probe_dies(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_pool, "PROBE_S", (0.2, 0.5))
    away = EndpointSpec("judge", "http://127.0.0.1:9/v1", "m", max_wait=30)
    answers = [f"{kind} {tmp_path / kind}" for kind in ("fragile", "patient")]
    with RewardRunner({"t": [spec("plugins.py:waits")]}, plugins, endpoints={"judge": away}) as waiting:
        fragile, patient = waiting.score([rollout(answer, task="t") for answer in answers])
    assert fragile.invalid == "reward waits: its process was killed by SIGKILL"
    assert (patient.reward, patient.invalid) == (0.25, None)


def test_an_endpoint_that_the_recipe_lacks_is_refused_before_any_process_starts() -> None:
    with pytest.raises(ValueError, match=r"asks the endpoint 'jugde', .* add it under"):
        RewardRunner({"t": [spec("verifier", {"endpoint": "jugde"})]})
