"""An OpenAI-compatible proxy for any vLLM endpoint. The proxy adds SeRe and PaCoRe as modes of the same model.

    python -m rollout.serve --url http://host:8000/v1 --model NAME --port 9000

Clients choose the mode with the model's name. `NAME:sere` samples one trajectory. `NAME:pacore` samples many
trajectories and a synthesis. NAME without a mode uses the mode given by --mode. Everything else in a chat completion,
including streaming, works in the same way as at the vLLM endpoint. `usage` counts the tokens of all trajectories.

Clients cannot make the endpoint fetch anything: pictures must be in `data:` URLs. With --client-key-env, clients must
send a key. An address other than loopback needs this option.
"""

import argparse
import asyncio
import ipaddress
import json
import os
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from jinja2 import TemplateError

from rl.exits import DONE, run_command
from rl.interrupt import Interrupts
from rollout.pacore.client import (
    FULL_DISTRIBUTION,
    EndpointClient,
    EndpointUnreachable,
    NoAnswer,
    RequestRefused,
)
from rollout.pacore.prompt import Chat, SynthesisPrompt
from rollout.pacore.rounds import PromptTooLong, Reply, Round, draw_order, fit_messages, parse_plan, sample_trajectories
from rollout.pacore.target import add_target_options, target_of

MODES = ("sere", "pacore")
COMMENT_INTERVAL_S = 10.0  # seconds between keep-alive comments to a client that waits for the first tokens of a stream
ANSWER_FIELDS = {"stream", "stream_options", "n", "model", "messages", "seed", "logprobs", "top_logprobs"}
"""Fields of the client's request that are not copied into the requests for trajectories."""
UNSUPPORTED_FIELDS = ("tools", "tool_choice", "functions", "function_call")
SHUTDOWN_S = 2.0
NO_ENDPOINT = "the model does not answer at present"
UPSTREAM_ERRORS = (
    RequestRefused, NoAnswer, EndpointUnreachable, aiohttp.ClientError, OSError, ValueError
)  # fmt: skip
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, BAD_GATEWAY, UNAVAILABLE = 400, 401, 404, 502, 503
MOST_BYTES = 64 << 20  # maximum size of a request; pictures make requests large
MOST_REPLIES = 64  # maximum `n` of a request
MOST_REQUESTS = 256  # maximum number of requests that are answered at the same time
MOST_BYTES_IN_ALL = 1 << 30  # maximum size of all requests that are answered at the same time
HEALTH_S = 1.0  # for this number of seconds, `/health` repeats its last answer, so that it cannot flood the endpoint
PART_TYPES = ("text", "image_url")
FIELDS = frozenset(
    {
        *("model", "messages", "n", "seed", "user", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
        *("temperature", "top_p", "top_k", "min_p", "min_tokens", "stop", "stop_token_ids", "bad_words", "logit_bias"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty", "ignore_eos", "logprobs"),
        *("top_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
        *("response_format", "structured_outputs", "reasoning_effort", "include_reasoning", "parallel_tool_calls"),
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", *UNSUPPORTED_FIELDS),
    }
)
"""The fields that a request may have. vLLM has more, and some of them control the endpoint itself, such as
`kv_transfer_params`."""


class InvalidRequest(Exception):
    """The error for a request that cannot be answered. It has the reason and the HTTP status."""

    def __init__(self, reason: str, status: int = BAD_REQUEST) -> None:
        super().__init__(reason)
        self.status = status


class PacoreProxy:
    """The web application of the proxy.

    Args:
        client: the client that calls the vLLM endpoint.
        name: the model's name for clients of the proxy.
        plan: the number of trajectories in each round before the synthesis.
        mode: the default mode, for requests whose model name contains no mode.
        key: the key that clients must send, or None if they need no key.
    """

    def __init__(
        self,
        client: EndpointClient,
        name: str,
        plan: Sequence[int],
        mode: str,
        synthesis: SynthesisPrompt,
        key: str | None = None,
    ) -> None:
        self.client, self.name, self.plan, self.mode, self.synthesis = client, name, plan, mode, synthesis
        self.names = [name, *(f"{name}:{mode}" for mode in MODES)]
        self._key, self._under_way, self._bytes = key, 0, 0
        self._works, self._asked = False, float("-inf")  # the last answer of /health, and when it was found

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MOST_BYTES, middlewares=[self._admit])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses requests without the right key, and requests beyond MOST_REQUESTS."""
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._key and request.path != "/health" and not secrets.compare_digest(sent.encode(), self._key.encode()):
            return _error(UNAUTHORIZED, "the key in the header Authorization is missing or wrong")
        if request.path == "/health":  # is answered also while the proxy is busy
            return await handler(request)
        if self._under_way >= MOST_REQUESTS:
            return _error(UNAVAILABLE, f"{MOST_REQUESTS} requests are under way; try again later")
        size = min(MOST_BYTES, request.content_length or MOST_BYTES)  # a request without a length may be as large
        if self._bytes + size > MOST_BYTES_IN_ALL and self._under_way:
            return _error(UNAVAILABLE, f"requests with {MOST_BYTES_IN_ALL >> 20} MiB are under way; try again later")
        self._under_way, self._bytes = self._under_way + 1, self._bytes + size
        try:
            return await handler(request)
        finally:
            self._under_way, self._bytes = self._under_way - 1, self._bytes - size

    async def _health(self, request: web.Request) -> web.Response:
        if time.monotonic() - self._asked > HEALTH_S:
            self._asked = time.monotonic()
            self._works = await self.client.works()
        return web.Response() if self._works else _error(UNAVAILABLE, NO_ENDPOINT)

    async def _models(self, request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "rollout.serve"} for name in self.names]
        return web.json_response({"object": "list", "data": data})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await _parse_body(request)
            mode = self._mode(body)
            if mode == "sere":
                return await self._forward(request, body)
            _check_pacore(body)
            return await (self._stream_synthesis if body.get("stream") else self._synthesise)(request, body)
        except InvalidRequest as error:
            return _error(error.status, str(error))
        except PromptTooLong as error:
            return _error(BAD_REQUEST, str(error))
        except TemplateError as error:
            return _error(BAD_REQUEST, f"the synthesis template fails: {error}")
        except UPSTREAM_ERRORS as error:
            if isinstance(error, RequestRefused) and error.only_this:  # the client gets the endpoint's error message
                return web.Response(status=error.status, text=error.body, content_type="application/json")
            return _error(BAD_GATEWAY, _public(error))

    def _mode(self, body: Mapping[str, Any]) -> str:
        """Returns the mode that the model's name selects. Raises InvalidRequest for an unknown model."""
        model = str(body.get("model", self.name))
        if model not in self.names:
            raise InvalidRequest(f"there is no model {model!r}; models are {', '.join(self.names)}", NOT_FOUND)
        return self.mode if model == self.name else model.removeprefix(f"{self.name}:")

    async def _forward(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            answer = await self.client.complete(body)
            return web.json_response({**answer, "model": body.get("model", self.name)})
        response = _event_stream()
        try:
            async with self.client.stream(body) as events:
                await response.prepare(request)
                async for piece in events.iter_any():
                    await response.write(piece)
        except (aiohttp.ClientError, TimeoutError) as error:
            await self._report_in_stream(response, error)
        await response.write_eof()
        return response

    async def _report_in_stream(self, response: web.StreamResponse, error: Exception) -> None:
        """Sends an error as an event of the stream. If the stream has not begun, the error is raised instead, so that
        the client gets an HTTP error status."""
        if not response.prepared:
            raise error
        if isinstance(error, RequestRefused) and error.only_this:  # the client gets the endpoint's error message
            shown = error.body
        else:
            shown = _public(error) if isinstance(error, UPSTREAM_ERRORS) else str(error)
        await response.write(_event({"error": {"message": shown, "type": type(error).__name__}}))

    # PaCoRe

    async def _synthesise(self, request: web.Request, body: Mapping[str, Any]) -> web.Response:
        seed = _seed(body)
        rounds = await self._sample_trajectories(body, seed)
        messages = rounds[-1].messages

        async def attempt(shown: int) -> dict[str, Any]:
            return await self.client.complete(self._synthesis_body(body, messages, shown, seed), len(self.plan))

        answer, shown = await fit_messages(len(messages), attempt)
        usage = _usage(rounds, answer.get("usage") or {})
        pacore = {"trajectories": [len(one_round.replies) for one_round in rounds], "messages_shown": shown}
        return web.json_response({**answer, "model": body.get("model", self.name), "usage": usage, "pacore": pacore})

    async def _stream_synthesis(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        """Streams the synthesis. Until the first token arrives, the client gets comments, which keep the connection
        alive."""
        seed, response = _seed(body), _event_stream()
        trajectories = asyncio.create_task(self._sample_trajectories(body, seed))
        try:
            while not (await asyncio.wait([trajectories], timeout=COMMENT_INTERVAL_S))[0]:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(b": thinking\n\n")
            rounds = trajectories.result()
            async for line in self._synthesis_lines(body, rounds, seed):
                if not response.prepared:
                    await response.prepare(request)
                await response.write(line)
        except (PromptTooLong, TemplateError, *UPSTREAM_ERRORS) as error:
            await self._report_in_stream(response, error)
        finally:
            trajectories.cancel()  # the trajectories still run if the client has disconnected
        await response.write_eof()
        return response

    async def _synthesis_lines(
        self, body: Mapping[str, Any], rounds: Sequence[Round], seed: str
    ) -> AsyncIterator[bytes]:
        messages = rounds[-1].messages
        async with AsyncExitStack() as stack:

            async def attempt(shown: int) -> aiohttp.StreamReader:
                synthesis = self._synthesis_body(body, messages, shown, seed)
                return await stack.enter_async_context(self.client.stream(synthesis, len(self.plan)))

            events, _ = await fit_messages(len(messages), attempt)
            async for line in events:
                yield self._rewrite_line(line, body, rounds)

    def _rewrite_line(self, line: bytes, body: Mapping[str, Any], rounds: Sequence[Round]) -> bytes:
        """Changes a line of the endpoint's stream: replaces the model name with the name that the client used, and adds
        the tokens of all trajectories to the usage."""
        if not line.startswith(b"data: {"):
            return line
        chunk = json.loads(line.removeprefix(b"data: "))
        chunk["model"] = body.get("model", self.name)
        if chunk.get("usage"):
            chunk["usage"] = _usage(rounds, chunk["usage"])
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n"

    async def _sample_trajectories(self, body: Mapping[str, Any], seed: str) -> tuple[Round, ...]:
        fields = {name: value for name, value in body.items() if name not in ANSWER_FIELDS}

        async def sample(chat: Chat, seed: int, urgency: int, count: int = 1) -> list[Reply]:
            trajectory = {**FULL_DISTRIBUTION, **fields, "messages": list(chat), "seed": seed}
            return await self.client.replies(trajectory, urgency, count)

        return await sample_trajectories(body["messages"], self.plan, sample, self.synthesis, seed)

    def _synthesis_body(
        self, body: Mapping[str, Any], messages: Sequence[str], shown: int, seed: str
    ) -> dict[str, Any]:
        chosen = [messages[place] for place in draw_order(len(messages), shown, f"{seed}/synthesis")]
        return {**FULL_DISTRIBUTION, **body, "messages": list(self.synthesis.with_messages(body["messages"], chosen))}


async def _parse_body(request: web.Request) -> dict[str, Any]:
    """Returns the body of a request. Raises InvalidRequest if its form is wrong, if it is too large, or if it makes the
    endpoint fetch something."""
    try:
        text = await request.text()
        body = await asyncio.to_thread(json.loads, text)  # a large body would block all other requests
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request is not JSON: {error}") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise InvalidRequest(f"the request has more than {MOST_BYTES >> 20} MiB", error.status) from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise InvalidRequest("messages must be a list that is not empty")
    if unknown := sorted(body.keys() - FIELDS):
        raise InvalidRequest(f"the field {unknown[0]!r:.100} is not supported; fields are {', '.join(sorted(FIELDS))}")
    replies = body.get("n")
    if replies is not None and (type(replies) is not int or not 1 <= replies <= MOST_REPLIES):
        raise InvalidRequest(f"n = {replies!r:.100} must be a whole number from 1 to {MOST_REPLIES}")
    for message in body["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            _check_part(part)
    return body


def _check_part(part: Any) -> None:
    """Raises InvalidRequest if a part of a message is neither a text nor a picture in a `data:` URL. With other URLs, a
    client could make the endpoint send requests to internal addresses. vLLM reads some keys whatever the type is, so
    other keys are refused too."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PART_TYPES:
        raise InvalidRequest(f"a part of a message has the type {kind!r}; types are {', '.join(PART_TYPES)}")
    if unknown := [key for key in part if key not in ("type", kind)]:
        raise InvalidRequest(f"a part of a message has the key {unknown[0]!r}; keys are type and {kind}")
    if kind == "image_url":
        picture = part.get("image_url")
        url = picture.get("url") if isinstance(picture, dict) else picture
        if not isinstance(url, str) or not url.lower().startswith("data:"):
            raise InvalidRequest("a picture must be in a data: URL; other URLs are not fetched")


def _check_pacore(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if PaCoRe cannot answer the request."""
    last = body["messages"][-1]
    if not isinstance(last, dict) or last.get("role") != "user":
        raise InvalidRequest("the last message must be from the user: PaCoRe adds final answers to it")
    content = last.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str) and not (parts and all(map(_is_part, parts))):
        raise InvalidRequest("the content of the last message must be a text, or a list of parts with a type")
    if body.get("n", 1) != 1:
        raise InvalidRequest(f"n = {body['n']}: PaCoRe gives one answer; set n to 1")
    if used := [name for name in UNSUPPORTED_FIELDS if body.get(name)]:
        raise InvalidRequest(f"PaCoRe does not support the field {used[0]}; use the mode sere")


def _is_part(part: Any) -> bool:
    """True if `part` is a valid part of a message's content. A part of type text must have a text."""
    return isinstance(part, dict) and "type" in part and (part["type"] != "text" or isinstance(part.get("text"), str))


def _seed(body: Mapping[str, Any]) -> str:
    """Returns the seed of the request, or a random seed if the request has none."""
    return f"{body['seed']}" if body.get("seed") is not None else f"{random.SystemRandom().getrandbits(64)}"


def _usage(rounds: Sequence[Round], final: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the tokens of all trajectories to the usage that the endpoint reported for the synthesis."""
    replies = [reply for one_round in rounds for reply in one_round.replies]
    prompt = int(final.get("prompt_tokens") or 0) + sum(reply.prompt_tokens for reply in replies)
    completion = int(final.get("completion_tokens") or 0) + sum(reply.tokens for reply in replies)
    return {
        **final,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _event_stream() -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    return web.StreamResponse(headers=headers)


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _public(error: Exception) -> str:
    """Prints an error of the endpoint for the operator, and returns the message for clients, which must not learn the
    endpoint's address."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return NO_ENDPOINT


def _error(status: int, reason: str) -> web.Response:
    kind = "invalid_request_error" if status < BAD_GATEWAY else "upstream_error"
    return web.json_response({"error": {"message": reason, "type": kind, "code": status}}, status=status)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m rollout.serve", description="Serves a model with two modes, SeRe and PaCoRe."
    )
    p.add_argument("--model", required=True, help="Hugging Face folder or hub id; with --url: its name at the endpoint")
    p.add_argument("--name", help="the model's name for clients; default: the value of --model")
    p.add_argument("--mode", choices=MODES, default="pacore", help="mode if the model name has none (default: pacore)")
    p.add_argument("--trajectories", default="16", metavar="PLAN", help="trajectories per round, e.g. 32,4; default 16")
    p.add_argument(
        "--template", type=Path, help="Jinja file of the synthesis prompt; default: the file in the model's folder"
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    p.add_argument("--port", type=int, default=9000)
    p.add_argument(
        "--client-key-env", metavar="NAME",
        help="environment variable with the key that clients must send; needed if --host is not this machine only",
    )  # fmt: skip
    add_target_options(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_args(arguments)
    return run_command(
        lambda: _main(args), input_errors=(ValueError, FileNotFoundError), failures=(RuntimeError, OSError)
    )


def _main(args: argparse.Namespace) -> int:
    _client_key(args)
    target, plan = target_of(args), parse_plan(args.trajectories)
    synthesis = SynthesisPrompt(target.synthesis_template(args.template))
    with target.serve() as url:
        asyncio.run(_serve(args, target.client(url, {}), plan, synthesis))
    return DONE


def _client_key(args: argparse.Namespace) -> str | None:
    """Returns the key that clients must send. Raises ValueError if the proxy needs a key and has none."""
    if args.client_key_env:
        if not (key := os.environ.get(args.client_key_env)):
            raise ValueError(f"the environment variable {args.client_key_env} is not set; it must contain a key")
        return key
    if not _is_loopback(args.host):
        raise ValueError(
            f"other machines can reach {args.host}, so clients need a key: put a key into an environment variable and "
            "give its name with --client-key-env"
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(
    args: argparse.Namespace,
    connection: AbstractAsyncContextManager[EndpointClient],
    plan: Sequence[int],
    synthesis: SynthesisPrompt,
) -> None:
    async with connection as client:
        proxy = PacoreProxy(client, args.name or args.model, plan, args.mode, synthesis, _client_key(args))
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        interrupts = Interrupts(wake=lambda: loop.call_soon_threadsafe(stopped.set))
        # With handler_cancellation, the trajectories of a request end when its client disconnects or the server ends.
        runner = web.AppRunner(proxy.app(), handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            with interrupts.installed(), interrupts.waiting():
                await web.TCPSite(runner, args.host, args.port).start()
                served = f"{proxy.name}, {proxy.name}:sere and {proxy.name}:pacore"
                print(f"http://{args.host}:{args.port}/v1 serves {served}")
                await stopped.wait()
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    sys.exit(main())
