"""Tests requests to endpoints that are slow, busy, absent or wrongly configured, and requests that are refused. Also
tests the clock that limits the time of a sample."""

import asyncio
import email.utils
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel

from rewards.endpoint import (
    EndpointName,
    EndpointSpec,
    Refused,
    SampleClock,
    Unreachable,
    clock,
    configure,
    endpoint,
    is_endpoint_name,
)
from rewards.replies import Unparsable
from tests.support.judge_server import JudgeServer, Reply, hurry, judge_server

KEY = "sk-very-secret"


class Colour(BaseModel):
    colour: Literal["red", "blue"]


RED = {"colour": "red"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@contextmanager
def judge(script: Any, **options: Any) -> Iterator[JudgeServer]:
    """Starts a server and configures it as the endpoint `judge`."""
    with judge_server(script) as server:
        configure({"judge": EndpointSpec("judge", server.url, "some-model", **options)})
        yield server


async def ask(seed: int = 0) -> Colour:
    messages = [{"role": "user", "content": "Which colour?"}]
    answer, _ = await endpoint("judge").ask(messages, answer=Colour, max_tokens=9, temperature=0.5, seed=seed)
    return answer


def asked(seed: int = 0) -> Colour:
    return asyncio.run(ask(seed))


# Requests


def test_a_request_carries_model_limits_seed_and_the_schema_of_the_answer() -> None:
    with judge([RED]) as server:
        assert asked(seed=7) == Colour(colour="red")
    sent = server.requests[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("some-model", 9, 0.5, 7)
    form = sent["response_format"]
    assert (form["type"], form["json_schema"]["schema"]) == ("json_schema", Colour.model_json_schema())


def test_a_server_without_structured_output_gets_no_schema() -> None:
    with judge([RED], structured=False) as server:
        asked()
    assert "response_format" not in server.requests[0]


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=429),
        Reply(status=500),
        Reply(status=503, headers={"Retry-After": "0"}),
        Reply(closes=True),
        Reply(after_s=5),
        Reply(body="<html>a proxy's page</html>"),
        Reply(body='{"unexpected": true}'),
    ],
    ids=["429", "500", "503", "closed", "slow", "no JSON", "no completion"],
)
def test_a_request_that_fails_at_first_is_sent_again(trouble: Reply) -> None:
    with judge([trouble, trouble, RED], retries=2, timeout_s=0.5) as server:
        assert asked() == Colour(colour="red")
    assert len(server.requests) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_a_retry_waits_as_retry_after_says_in_seconds_or_as_a_date(as_date: bool) -> None:
    # a date has whole seconds, so a date two seconds from now is at least one second away
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.6"
    with judge([Reply(status=429, headers={"Retry-After": wait}), RED]):
        start = time.monotonic()
        asked()
    assert time.monotonic() - start > 0.5


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Reply(status=500), "HTTP 500: as scripted, after 3 tries"),
        (Reply(closes=True), "no connection to http"),
        (Reply(after_s=5), "no answer from http.* within 0.2 s, after 3 tries"),
    ],
    ids=["500", "closed", "slow"],
)
def test_an_endpoint_that_fails_after_all_retries_raises_unreachable_with_its_name(trouble: Reply, said: str) -> None:
    with judge([trouble], retries=2, timeout_s=0.2) as server, pytest.raises(Unreachable, match=said) as caught:
        asked()
    assert (caught.value.endpoint, len(server.requests)) == ("judge", 3)
    assert "endpoint judge" in str(caught.value)


def test_a_url_without_a_server_raises_unreachable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        configure({"judge": EndpointSpec("judge", f"http://127.0.0.1:{free.getsockname()[1]}/v1", "m", retries=1)})
    with pytest.raises(Unreachable, match=r"no connection to .*, after 2 tries"):
        asked()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_model_or_url_raises_unreachable_at_once_with_what_to_check(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    said = f"HTTP {status}: .*check the key in JUDGE_KEY, the url http.*/v1 and the model some-model"
    with (
        judge([Reply(status=status)], api_key_env="JUDGE_KEY") as server,
        pytest.raises(Unreachable, match=said) as caught,
    ):
        asked()
    assert (caught.value.status, len(server.requests)) == (status, 1)


@pytest.mark.parametrize(
    "reply",
    [
        Reply("context too long", status=400),
        Reply(status=413),
        Reply(status=422),
        Reply("your input was flagged", status=403),
        Reply("{", finish="content_filter"),
    ],
    ids=["400", "413", "422", "403 by moderation", "filtered"],
)
def test_a_request_that_the_endpoint_refuses_is_not_sent_again(reply: Reply) -> None:
    with judge([reply]) as server, pytest.raises(Refused):
        asked()
    assert len(server.requests) == 1


def test_at_most_concurrency_requests_run_at_a_time() -> None:
    async def many() -> None:
        await asyncio.gather(*(ask(seed) for seed in range(12)))

    with judge([Reply(RED, after_s=0.05)], concurrency=3) as server:
        asyncio.run(many())
    assert (len(server.requests), server.peak) == (12, 3)


def test_a_chat_is_made_only_when_its_request_is_sent() -> None:
    made: list[int] = []

    def chat() -> list[dict[str, str]]:
        made.append(len(server.requests))
        return [{"role": "user", "content": "Which colour?"}]

    async def many() -> None:
        one = endpoint("judge")
        await asyncio.gather(*(one.ask(chat, answer=Colour, max_tokens=9, temperature=0.5, seed=0) for _ in range(6)))

    with judge([Reply(RED, after_s=0.05)], concurrency=1) as server:
        asyncio.run(many())
    assert made == [0, 1, 2, 3, 4, 5]  # number of requests that were sent before each chat was made


# Answers


@pytest.mark.parametrize(
    ("reply", "said"),
    [(Reply(RED, finish="length"), "did not finish its reply within 9 tokens"), (Reply(None), "no Colour")],
)
def test_a_reply_that_ran_out_of_tokens_or_is_empty_is_unparsable(reply: Reply, said: str) -> None:
    with judge([reply]), pytest.raises(Unparsable, match=said):
        asked()


# Keys and names


def test_the_key_comes_from_the_environment_and_is_in_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for reply in (Reply(f"bad key {KEY}", status=401), Reply(f"bad key {KEY}", status=400)):
        with judge([reply], api_key_env="JUDGE_KEY") as server, pytest.raises((Unreachable, Refused)) as caught:
            asked()
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert r"bad key [key]" in str(caught.value)
        assert KEY not in str(caught.getrepr(style="short"))
    assert KEY not in "".join(record.getMessage() for record in caplog.records)


def test_an_endpoint_without_a_key_gets_no_other_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with judge([RED]) as server:
        asked()
    assert KEY not in str(server.headers)


def test_a_missing_key_is_an_error_at_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    configure({"judge": EndpointSpec("judge", "http://127.0.0.1:1/v1", "m", api_key_env="JUDGE_KEY")})
    with pytest.raises(ValueError, match="endpoint judge: environment variable JUDGE_KEY has no API key"):
        endpoint("judge")


def test_an_unknown_endpoint_is_an_error_that_lists_the_known_ones() -> None:
    configure({"judge": EndpointSpec("judge", "http://127.0.0.1:1/v1", "m")})
    with pytest.raises(ValueError, match="'jugde'; add it under `endpoints:` \\(there are: judge\\)"):
        endpoint("jugde")


def test_invalid_endpoint_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"endpoints\.judge: concurrency is 0"):
        EndpointSpec("judge", "http://127.0.0.1:1/v1", "m", concurrency=0)


def test_endpoint_parameters_are_recognised_by_their_annotation() -> None:
    assert is_endpoint_name(EndpointName)
    assert is_endpoint_name(EndpointName | None)
    assert not any(map(is_endpoint_name, (str, str | None, Annotated[str, "x"], 3, "EndpointName")))


def test_the_client_library_is_imported_only_when_an_endpoint_is_created() -> None:
    code = "import sys, rewards; rewards.names(); print('openai' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert found.stdout.strip() == "False"


# The sample's clock


async def limited(seconds: float, awaitable: Any) -> float:
    """Awaits `awaitable` with a time limit, as the async worker does. Returns the seconds that count towards this
    limit."""
    running = SampleClock()
    clock.set(running)
    await running.limit(seconds, awaitable)
    return running.elapsed


def test_time_over_the_limit_cancels_and_raises() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(limited(0.05, asyncio.sleep(5)))


def test_paused_time_does_not_count_even_if_pauses_nest_or_overlap() -> None:
    async def pausing(seconds: float) -> None:
        running = clock.get()
        assert running
        with running.paused(), running.paused():
            await asyncio.sleep(seconds)

    async def several() -> None:
        await asyncio.gather(pausing(0.1), pausing(0.3))
        await asyncio.sleep(0.05)

    assert 0.04 < asyncio.run(limited(0.15, several())) < 0.15


def test_the_rest_of_the_limit_applies_after_a_pause() -> None:
    async def pause_then_dawdle() -> None:
        running = clock.get()
        assert running
        with running.paused():
            await asyncio.sleep(0.1)
        await asyncio.sleep(5)

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(limited(0.1, pause_then_dawdle()))
    assert 0.15 < time.monotonic() - start < 1


def test_waiting_for_a_slot_does_not_count_against_a_sample() -> None:
    async def queue() -> list[float]:
        # Each request takes 0.1 s. The requests run one at a time, so the last request starts after 0.5 s.
        return await asyncio.gather(*(asyncio.create_task(limited(0.3, ask(seed))) for seed in range(6)))

    with judge([Reply(RED, after_s=0.1)], concurrency=1):
        endpoint("judge")
        used = asyncio.run(queue())
    assert all(0.05 < seconds < 0.3 for seconds in used)


def test_failed_requests_and_waiting_to_retry_do_not_count_against_a_sample() -> None:
    trouble = [Reply(status=429, headers={"Retry-After": "0.4"}), Reply(after_s=5), Reply(status=500, after_s=0.2)]
    with judge([*trouble, RED], timeout_s=0.25):
        endpoint("judge")
        assert asyncio.run(limited(0.35, ask())) < 0.2
