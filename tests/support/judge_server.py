"""A scripted judge for tests: an OpenAI-compatible server that runs in a thread of the test process."""

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from rewards import endpoint


@dataclass(frozen=True)
class Reply:
    """Describes how the server answers one request."""

    content: str | dict[str, Any] | None = None  # the judge's message; a dict is sent as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    after_s: float = 0.0
    closes: bool = False  # if True, the server closes the connection without an answer
    body: str | None = None  # text that is sent instead of a chat completion


Script = Callable[[dict[str, Any]], "Reply | dict[str, Any] | str"]


class JudgeServer:
    """Answers each request with `script(request)`. If `script` is a list of replies, the server sends these replies
    in order and repeats the last reply.

    requests  the bodies of the requests, in order
    headers   the headers of the requests, in order
    peak      the maximum number of requests at the same time
    """

    def __init__(self, script: Script | list[Any]):
        self._script = script if callable(script) else self._in_order(script)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.peak = self._under_way = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def prompts(self) -> list[str]:
        """Returns the text of each request."""
        return [text_of(request) for request in self.requests]

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _in_order(self, replies: list[Any]) -> Script:
        return lambda request: replies[min(len(self.requests), len(replies)) - 1]

    def _run(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self._port = runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        said = self._script(body)
        reply = said if isinstance(said, Reply) else Reply(said)
        self._under_way += 1
        self.peak = max(self.peak, self._under_way)
        try:
            await asyncio.sleep(reply.after_s)
        finally:
            self._under_way -= 1
        if reply.closes:
            assert request.transport
            request.transport.close()
        if reply.body is not None:
            return web.Response(text=reply.body, status=reply.status, content_type="application/json")
        if reply.status != 200:
            error = {"error": {"message": reply.content or "as scripted", "type": "scripted", "code": None}}
            return web.json_response(error, status=reply.status, headers=reply.headers)
        return web.json_response(completion(body["model"], reply, body.get("n", 1)))


def completion(model: str, reply: Reply, count: int = 1) -> dict[str, Any]:
    """Returns a chat completion with `count` identical choices."""
    content = json.dumps(reply.content) if isinstance(reply.content, dict) else reply.content
    message = {"role": "assistant", "content": content}
    choices = [{"index": n, "message": message, "finish_reason": reply.finish} for n in range(count)]
    return {"id": "c", "object": "chat.completion", "created": 0, "model": model, "choices": choices}


def text_of(request: dict[str, Any]) -> str:
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes delays: retries wait at most 20 ms, and clients load no certificates (the judge uses plain HTTP)."""
    monkeypatch.setattr(endpoint, "RETRY_S", (0.01, 0.02))
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


@contextmanager
def judge_server(script: Script | list[Any]) -> Iterator[JudgeServer]:
    server = JudgeServer(script)
    try:
        server.start()
        yield server
    finally:
        server.stop()
