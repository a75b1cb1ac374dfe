"""Tests the OpenAI-compatible proxy with a scripted endpoint: modes in model names, streams, usage and errors."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from openai import (
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)

from rollout import serve
from rollout.pacore import client as client_module
from rollout.pacore.client import EndpointClient
from rollout.pacore.prompt import SynthesisPrompt
from rollout.serve import PacoreProxy
from tests.support.command import Command, wait_for
from tests.support.judge_server import judge_server

ASK: list[Any] = [{"role": "user", "content": "What is 2 + 2?"}]
LONG = "This model's maximum context length is 10 tokens. However, you requested more"


@pytest.fixture(autouse=True)
def allow_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the proxy forward the field `wait`, the number of seconds that the scripted endpoint takes."""
    monkeypatch.setattr(serve, "FIELDS", serve.FIELDS | {"wait"})


class ScriptedEndpoint:
    """A scripted vLLM endpoint. It waits for `wait` seconds before it answers."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.fail: Callable[[dict[str, Any]], web.Response | None] = lambda body: None
        self.under_way = 0

    async def models(self, request: web.Request) -> web.Response:
        return self.fail({}) or web.json_response({"data": []})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if (failed := self.fail(body)) is not None:
            return failed
        if body.get("n", 1) > 1 and body.get("temperature", 1) == 0:
            return web.json_response({"error": {"message": "n must be 1 when using greedy sampling"}}, status=400)
        text = "4" if "Answer 1" in text_of(body) else "<think>a</think>four"
        if not body.get("stream"):
            self.under_way += 1
            try:
                await asyncio.sleep(body.get("wait", 0))
            finally:
                self.under_way -= 1
            message = {"role": "assistant", "content": text}
            count = body.get("n", 1)
            ids = {"token_ids": [7, 7, 7]} if body.get("return_token_ids") else {}
            choices = [{"index": n, "message": message, "finish_reason": "stop", **ids} for n in range(count)]
            usage = {**USAGE, "completion_tokens": 3 * count, "total_tokens": 10 + 3 * count}
            return web.json_response(envelope("chat.completion", *choices, usage=usage))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in ("", *text):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            await response.write(event(envelope("chat.completion.chunk", choice)))
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(event({**envelope("chat.completion.chunk"), "choices": [], "usage": USAGE}))
        await response.write(b"data: [DONE]\n\n")
        return response


USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}


def envelope(kind: str, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "x", "object": kind, "created": 0, "model": "behind", "choices": list(choices), **more}


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@asynccontextmanager
async def site(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def served(
    behind: ScriptedEndpoint, plan: tuple[int, ...] = (4,), retries: int = 0, key: str | None = None
) -> AsyncIterator[AsyncOpenAI]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", behind.answer)
    app.router.add_get("/v1/models", behind.models)
    async with (
        site(app) as url,
        EndpointClient(url, "behind", retries=retries) as asks,
        site(PacoreProxy(asks, "step", plan, "pacore", SynthesisPrompt(), key).app()) as front,
        AsyncOpenAI(base_url=front, api_key=key or "none", max_retries=0) as client,
    ):
        yield client


def run(scenario: Callable[[AsyncOpenAI, ScriptedEndpoint], Awaitable[Any]], plan: tuple[int, ...] = (4,)) -> Any:
    async def whole() -> Any:
        behind = ScriptedEndpoint()
        async with served(behind, plan) as client:
            return await scenario(client, behind)

    return asyncio.run(whole())


def test_the_mode_pacore_answers_from_many_trajectories() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        answer = await client.chat.completions.create(model="step:pacore", messages=ASK, seed=1)
        assert (answer.choices[0].message.content, answer.model) == ("4", "step:pacore")
        assert answer.usage is not None and answer.usage.completion_tokens == 5 * 3
        assert answer.usage.total_tokens == 5 * 13
        trajectories, last = behind.bodies
        assert (text_of(trajectories), trajectories["n"]) == ("What is 2 + 2?", 4)
        assert text_of(last).count("four") == 4 and "<think>" not in text_of(last)
        assert {body["model"] for body in behind.bodies} == {"behind"}

    run(scenario)


def test_the_mode_sere_forwards_the_request_unchanged() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        answer = await client.chat.completions.create(model="step:sere", messages=ASK, temperature=0.3)
        assert answer.choices[0].message.content == "<think>a</think>four"
        (body,) = behind.bodies
        assert body == {"model": "behind", "messages": ASK, "temperature": 0.3}

    run(scenario)


def test_greedy_trajectories_are_requested_one_by_one_because_vllm_refuses_n() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        answer = await client.chat.completions.create(model="step", messages=ASK, temperature=0)
        assert answer.choices[0].message.content == "4" and len(behind.bodies) == 5

    run(scenario)


def test_fields_of_the_request_are_sent_with_all_trajectories() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        await client.chat.completions.create(model="step", messages=ASK, temperature=0.6, max_tokens=77)
        assert [(body["temperature"], body["max_tokens"]) for body in behind.bodies] == [(0.6, 77)] * 2

    run(scenario)


def test_the_synthesis_prompt_contains_the_pictures_of_the_problem() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages: list[Any] = [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}]

    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        await client.chat.completions.create(model="step", messages=messages)
        assert all(picture in body["messages"][-1]["content"] for body in behind.bodies)

    run(scenario)


@pytest.mark.parametrize(
    ("model", "text", "tokens"), [("step:pacore", "4", 15), ("step:sere", "<think>a</think>four", 3)]
)
def test_the_final_answer_is_streamed_token_by_token(model: str, text: str, tokens: int) -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        stream = await client.chat.completions.create(
            model=model, messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(pieces) == text and len(pieces) == len(text) + 1
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == tokens

    run(scenario)


def test_a_client_that_waits_for_a_stream_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.serve.COMMENT_INTERVAL_S", 0.02)

    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        body = {"model": "step", "messages": ASK, "stream": True, "wait": 0.2}
        url = f"{client.base_url}chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            lines = [line async for line in answer.content]
        assert lines[0] == b": thinking\n" and lines[-2] == b"data: [DONE]\n"

    run(scenario)


def test_trajectories_end_when_the_client_disconnects() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        request = asyncio.create_task(
            client.chat.completions.create(model="step", messages=ASK, extra_body={"wait": 30})
        )
        async with asyncio.timeout(10):
            while not behind.under_way:
                await asyncio.sleep(0.01)
            request.cancel()
            while behind.under_way:
                await asyncio.sleep(0.01)

    run(scenario)


def test_messages_that_do_not_fit_into_the_prompt_are_left_out() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        behind.fail = lambda body: (
            web.json_response({"error": {"message": LONG}}, status=400) if text_of(body).count("Answer ") > 2 else None
        )
        answer = await client.chat.completions.create(model="step", messages=ASK)
        assert answer.model_extra is not None and answer.model_extra["pacore"]["messages_shown"] == 2

    run(scenario)


def test_a_large_token_limit_leaves_no_message_out() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        behind.fail = lambda body: (
            web.json_response({"error": {"message": LONG}}, status=400) if body.get("max_tokens", 0) > 50 else None
        )
        answer = await client.chat.completions.create(model="step", messages=ASK, max_tokens=60)
        assert answer.model_extra is not None and answer.model_extra["pacore"]["messages_shown"] == 4

    run(scenario)


def test_a_stream_is_retried_until_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.01, 0.02))

    async def scenario() -> None:
        behind, failures = ScriptedEndpoint(), iter(range(100))
        behind.fail = lambda body: web.Response(status=503) if body.get("stream") and next(failures) < 2 else None
        async with served(behind, retries=2) as client:
            stream = await client.chat.completions.create(model="step", messages=ASK, stream=True)
            pieces = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
        assert "".join(pieces) == "4" and len([b for b in behind.bodies if not b.get("stream")]) == 1

    asyncio.run(scenario())


def test_models_are_listed_with_their_modes() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        assert [model.id async for model in client.models.list()] == ["step", "step:sere", "step:pacore"]
        with pytest.raises(NotFoundError, match="there is no model 'other'; models are step, step:sere, step:pacore"):
            await client.chat.completions.create(model="other", messages=ASK)

    run(scenario)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 2}, "PaCoRe gives one answer; set n to 1"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "use the mode sere"),
        ({"messages": [*ASK, {"role": "assistant", "content": "4"}]}, "the last message must be from the user"),
        ({"messages": [{"role": "user", "content": 4}]}, "must be a text, or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a text, or a list of parts"),
        ({"messages": []}, "messages must be a list that is not empty"),
    ],
)
def test_a_request_that_pacore_cannot_answer_is_refused(change: dict[str, Any], why: str) -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        request: Any = {"model": "step", "messages": ASK, **change}
        with pytest.raises(BadRequestError, match=why):
            await client.chat.completions.create(**request)

    run(scenario)


URL = "http://169.254.169.254/latest"


@pytest.mark.parametrize("mode", ["sere", "pacore"])
@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, "must be in a data: URL"),
        ({"type": "image_url", "image_url": URL}, "must be in a data: URL"),
        ({"type": "image_url", "image_url": {"url": ["data:"]}}, "must be in a data: URL"),
        ({"type": "video_url", "video_url": {"url": URL}}, "has the type 'video_url'"),
        ({"type": "audio_url", "audio_url": {"url": URL}}, "has the type 'audio_url'"),
        ({"image_url": {"url": URL}}, "has the type None"),
        ({"type": ["text"]}, r"has the type \['text'\]"),
        (URL, "has the type None"),
        ({"type": "text", "text": "x", "uuid": "u", "image_url": URL}, "has the key 'uuid'"),
        ({"type": "text", "text": "x", "image_url": URL}, "has the key 'image_url'"),
        ({"type": "image_url", "image_url": {"url": "data:,"}, "video_url": URL}, "has the key 'video_url'"),
    ],
)
def test_a_client_cannot_make_the_endpoint_fetch_an_address(mode: str, part: Any, why: str) -> None:
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, *ASK]

    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        with pytest.raises(BadRequestError, match=why):
            await client.chat.completions.create(model=f"step:{mode}", messages=messages)
        assert behind.bodies == []

    run(scenario)


@pytest.mark.parametrize(
    "field", ["kv_transfer_params", "vllm_xargs", "mm_processor_kwargs", "chat_template", "x" * 500]
)
def test_fields_that_control_the_endpoint_are_refused(field: str) -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        with pytest.raises(BadRequestError, match="is not supported; fields are"):
            await client.chat.completions.create(model="step:sere", messages=ASK, extra_body={field: {}})
        assert behind.bodies == []

    run(scenario)


def test_requests_that_are_too_large_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_BYTES_IN_ALL", 1000)
    large: Any = [{"role": "user", "content": "x" * 900}]

    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        waits = client.chat.completions.create(model="step:sere", messages=large, extra_body={"wait": 5})
        first = asyncio.create_task(waits)
        while not behind.under_way:
            await asyncio.sleep(0.01)
        with pytest.raises(InternalServerError, match="MiB are under way"):
            await client.chat.completions.create(model="step:sere", messages=large)
        first.cancel()

    run(scenario)


def test_too_many_replies_requests_and_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_REQUESTS", 1)
    monkeypatch.setattr(serve, "MOST_BYTES", 10_000)

    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        for n in (65, "100000", 1000.0, True, 0, -1000, [2]):
            with pytest.raises(BadRequestError, match="must be a whole number from 1 to 64"):
                await client.chat.completions.create(model="step:sere", messages=ASK, extra_body={"n": n})
        with pytest.raises(APIStatusError) as large:
            await client.chat.completions.create(model="step", messages=[{"role": "user", "content": "x" * 10_000}])
        assert large.value.status_code == 413
        first = asyncio.create_task(
            client.chat.completions.create(model="step:sere", messages=ASK, extra_body={"wait": 5})
        )
        while not behind.under_way:
            await asyncio.sleep(0.01)
        with pytest.raises(InternalServerError, match="1 requests are under way"):
            await client.chat.completions.create(model="step:sere", messages=ASK)
        url = str(client.base_url).replace("/v1/", "/health")
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200  # a busy proxy is healthy
        first.cancel()

    run(scenario)


def test_clients_need_the_key_if_there_is_one() -> None:
    async def scenario() -> None:
        behind = ScriptedEndpoint()
        async with served(behind, key="right") as client, aiohttp.ClientSession() as session:
            await client.chat.completions.create(model="step:sere", messages=ASK)
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer r\u00efght"}):
                async with session.get(f"{client.base_url}models", headers=headers) as answer:
                    assert answer.status == 401
                body = {"model": "step:sere", "messages": ASK}
                async with session.post(f"{client.base_url}chat/completions", json=body, headers=headers) as answer:
                    assert answer.status == 401
        assert len(behind.bodies) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--host", "0.0.0.0"), "clients need a key"),
        (("--host", "example.org"), "clients need a key"),
        (("--client-key-env", "NOT_SET"), "environment variable NOT_SET is not set"),
    ],
)
def test_the_command_refuses_to_serve_other_machines_without_a_key(
    options: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--url", "http://127.0.0.1:9/v1", "--model", "m", *options]) == 2
    assert why in capsys.readouterr().err


def test_health_tells_whether_the_endpoint_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEALTH_S", 0.0)

    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        url = str(client.base_url).replace("/v1/", "/health")
        async with aiohttp.ClientSession() as session:
            for works, status in ((True, 200), (False, 503)):
                behind.fail = lambda body, works=works: None if works else web.Response(status=500)  # type: ignore[misc]
                async with session.get(url) as answer:
                    assert answer.status == status
            behind.fail = lambda body: None
            monkeypatch.setattr(serve, "HEALTH_S", 60.0)
            async with session.get(url) as answer:
                assert answer.status == 503  # the endpoint is not asked again so soon

    run(scenario)


def test_an_error_of_the_endpoint_is_forwarded_with_its_text() -> None:
    async def scenario(client: AsyncOpenAI, behind: ScriptedEndpoint) -> None:
        behind.fail = lambda body: web.json_response({"error": {"message": "temperature is odd"}}, status=400)
        with pytest.raises(BadRequestError, match="temperature is odd"):
            await client.chat.completions.create(model="step", messages=ASK)

    run(scenario)


def test_temporary_errors_are_retried_and_permanent_ones_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.01, 0.02))

    async def scenario() -> None:
        behind, failures = ScriptedEndpoint(), iter(range(100))
        async with served(behind, retries=2) as client:
            behind.fail = lambda body: web.Response(status=503) if next(failures) < 2 else None
            answer = await client.chat.completions.create(model="step", messages=ASK)
            assert answer.choices[0].message.content == "4"
            behind.fail = lambda body: web.Response(status=503)
            with pytest.raises(InternalServerError, match="the model does not answer at present") as caught:
                await client.chat.completions.create(model="step", messages=ASK)
            assert "127.0.0.1" not in str(caught.value)  # clients learn nothing about the endpoint

    asyncio.run(scenario())


def test_the_command_serves_until_it_gets_a_signal() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with judge_server(["<think>a</think>four"]) as behind:
        command = Command("rollout.serve", "--url", behind.url, "--model", "m", "--name", "step", "--port", port)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=60)
        wait_for(lambda: _listens(port), command)
        answer = client.chat.completions.create(model="step:sere", messages=ASK)
        assert answer.choices[0].message.content == "<think>a</think>four"
        os.killpg(command.process.pid, signal.SIGTERM)
        code, out, err = command.finish(30)
    assert (code, err) == (0, "") and f"http://127.0.0.1:{port}/v1 serves step, step:sere and step:pacore" in out


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
