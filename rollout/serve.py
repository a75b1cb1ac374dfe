"""An OpenAI-compatible endpoint in front of any vLLM endpoint, with SeRe and PaCoRe as modes of the same model.

    python -m rollout.serve --url http://host:8000/v1 --model NAME --port 9000

Clients choose the mode by the model's name: `NAME:sere` is one chain of thought, `NAME:pacore` many and a synthesis,
and NAME what --mode says. Everything else of a chat completion, streaming too, is as the endpoint behind has it;
`usage` counts the tokens of all trajectories.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from jinja2 import TemplateError

from rl.exits import DONE, run_command
from rollout.pacore.client import WHOLE, EndpointClient, Refused, Unreachable
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pacore.rounds import Reply, Round, TooLong, Turns, explore, order, plan_of, with_room
from rollout.pacore.target import add_target_options, target_of

MODES = ("sere", "pacore")
SIGN_OF_LIFE_S = 10.0  # between comments to a client that waits for a stream's first words
OF_THE_ANSWER = {"stream", "stream_options", "n", "model", "messages", "seed", "logprobs", "top_logprobs"}
"""Fields of a request that are not those of its trajectories, or have a value of their own there."""
FOR_ONE_REPLY = ("tools", "tool_choice", "functions", "function_call")
SHUTDOWN_S = 2.0
BAD_REQUEST, NOT_FOUND, BAD_GATEWAY = 400, 404, 502


class Wrong(Exception):
    """A request that cannot be answered: an HTTP status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Front:
    """The application.

    Args:
        name: the model's name for clients.
        plan: PaCoRe's trajectories of each round before the synthesis.
        mode: of requests for plain `name`.
    """

    def __init__(
        self, upstream: EndpointClient, name: str, plan: Sequence[int], mode: str, synthesis: SynthesisPrompt
    ) -> None:
        self.upstream, self.name, self.plan, self.mode, self.synthesis = upstream, name, plan, mode, synthesis

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)  # pictures come inside requests
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        names = [self.name, *(f"{self.name}:{mode}" for mode in MODES)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "rollout.serve"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await _json(request)
            mode = self._mode(body)
            if mode == "sere":
                return await self._plain(request, body)
            _check_pacore(body)
            return await (self._streamed if body.get("stream") else self._whole)(request, body)
        except Wrong as wrong:
            return _error(wrong.status, str(wrong))
        except TooLong as error:
            return _error(BAD_REQUEST, str(error))
        except TemplateError as error:
            return _error(BAD_REQUEST, f"the template of messages fails: {error}")
        except Refused as error:  # in the words of the endpoint behind
            return web.Response(status=error.status, text=error.body, content_type="application/json")
        except (Unreachable, aiohttp.ClientError, OSError, ValueError) as error:
            return _error(BAD_GATEWAY, str(error))

    def _mode(self, body: Mapping[str, Any]) -> str:
        """Raises Wrong for a model that is not ours."""
        asked = str(body.get("model", self.name))
        if asked == self.name:
            return self.mode
        for mode in MODES:
            if asked == f"{self.name}:{mode}":
                return mode
        known = ", ".join([self.name, *(f"{self.name}:{mode}" for mode in MODES)])
        raise Wrong(NOT_FOUND, f"there is no model {asked!r}; there are {known}")

    async def _plain(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            answer = await self.upstream.complete(body)
            return web.json_response({**answer, "model": body.get("model", self.name)})
        response = _events()
        try:
            async with self.upstream.stream(body) as events:
                await response.prepare(request)
                async for piece in events.iter_any():
                    await response.write(piece)
        except aiohttp.ClientError as error:
            await self._broken(response, error)
        await response.write_eof()
        return response

    async def _broken(self, response: web.StreamResponse, error: Exception) -> None:
        """Tells a client whose stream has begun; raises `error` if it has not, for an answer with a status."""
        if not response.prepared:
            raise error
        await response.write(_event({"error": {"message": str(error), "type": type(error).__name__}}))

    # PaCoRe

    async def _whole(self, request: web.Request, body: Mapping[str, Any]) -> web.Response:
        seed = _seed(body)
        rounds = await self._explored(body, seed)
        messages = rounds[-1].messages

        async def attempt(shown: int) -> dict[str, Any]:
            return await self.upstream.complete(self._final(body, messages, shown, seed), len(self.plan))

        answer, shown = await with_room(len(messages), attempt)
        usage = _usage(rounds, answer.get("usage") or {})
        told = {"trajectories": [len(one.replies) for one in rounds], "messages_shown": shown}
        return web.json_response({**answer, "model": body.get("model", self.name), "usage": usage, "pacore": told})

    async def _streamed(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        """The synthesis as it is written. Until it begins, comments tell the client that there is work."""
        seed, response = _seed(body), _events()
        exploring = asyncio.create_task(self._explored(body, seed))
        try:
            while not (await asyncio.wait([exploring], timeout=SIGN_OF_LIFE_S))[0]:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(b": thinking\n\n")
            rounds = exploring.result()
            async for line in self._events_of(body, rounds, seed):
                if not response.prepared:
                    await response.prepare(request)
                await response.write(line)
        except (TooLong, Refused, Unreachable, TemplateError, aiohttp.ClientError, ValueError) as error:
            await self._broken(response, error)
        finally:
            exploring.cancel()  # the client may have gone
        await response.write_eof()
        return response

    async def _events_of(self, body: Mapping[str, Any], rounds: Sequence[Round], seed: str) -> AsyncIterator[bytes]:
        messages = rounds[-1].messages
        async with AsyncExitStack() as stack:

            async def attempt(shown: int) -> aiohttp.StreamReader:
                final = self._final(body, messages, shown, seed)
                return await stack.enter_async_context(self.upstream.stream(final, len(self.plan)))

            events, _ = await with_room(len(messages), attempt)
            async for line in events:
                yield self._retold(line, body, rounds)

    def _retold(self, line: bytes, body: Mapping[str, Any], rounds: Sequence[Round]) -> bytes:
        """A line of the endpoint's stream with the model's name that the client knows, and all tokens in its usage."""
        if not line.startswith(b"data: {"):
            return line
        chunk = json.loads(line.removeprefix(b"data: "))
        chunk["model"] = body.get("model", self.name)
        if chunk.get("usage"):
            chunk["usage"] = _usage(rounds, chunk["usage"])
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n"

    async def _explored(self, body: Mapping[str, Any], seed: str) -> tuple[Round, ...]:
        fields = {name: value for name, value in body.items() if name not in OF_THE_ANSWER}

        async def ask(turns: Turns, seed: int, urgency: int, count: int = 1) -> list[Reply]:
            asked = {**WHOLE, **fields, "messages": list(turns), "seed": seed}
            return await self.upstream.ask(asked, urgency, count)

        return await explore(body["messages"], self.plan, ask, self.synthesis, seed)

    def _final(self, body: Mapping[str, Any], messages: Sequence[str], shown: int, seed: str) -> dict[str, Any]:
        chosen = [messages[place] for place in order(len(messages), shown, f"{seed}/synthesis")]
        return {**WHOLE, **body, "messages": list(self.synthesis.with_messages(body["messages"], chosen))}


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise Wrong(BAD_REQUEST, f"the request is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Wrong(BAD_REQUEST, "messages must be a list of turns that is not empty")
    return body


def _check_pacore(body: Mapping[str, Any]) -> None:
    """Raises Wrong for what a synthesis cannot have."""
    last = body["messages"][-1]
    if not isinstance(last, dict) or last.get("role") != "user":
        raise Wrong(BAD_REQUEST, "the last turn must be the user's: PaCoRe shows messages together with the problem")
    content = last.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str) and not (parts and all(map(_is_part, parts))):
        raise Wrong(BAD_REQUEST, "the last turn's content must be a text, or a list of parts that have a type")
    if body.get("n", 1) != 1:
        raise Wrong(BAD_REQUEST, f"n = {body['n']}: PaCoRe gives one answer; set n to 1")
    if used := [name for name in FOR_ONE_REPLY if body.get(name)]:
        raise Wrong(BAD_REQUEST, f"{used[0]} is not for PaCoRe, whose trajectories answer at once; use the mode sere")


def _is_part(part: Any) -> bool:
    """Of a turn's content; one of type text has to have it."""
    return isinstance(part, dict) and "type" in part and (part["type"] != "text" or isinstance(part.get("text"), str))


def _seed(body: Mapping[str, Any]) -> str:
    """The client's, or a new one."""
    return f"{body['seed']}" if body.get("seed") is not None else f"{random.SystemRandom().getrandbits(64)}"


def _usage(rounds: Sequence[Round], final: Mapping[str, Any]) -> dict[str, Any]:
    """The endpoint's usage of the synthesis with the tokens of all trajectories added."""
    replies = [reply for one in rounds for reply in one.replies]
    prompt = int(final.get("prompt_tokens") or 0) + sum(reply.prompt_tokens for reply in replies)
    completion = int(final.get("completion_tokens") or 0) + sum(reply.tokens for reply in replies)
    return {
        **final,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _events() -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    return web.StreamResponse(headers=headers)


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _error(status: int, why: str) -> web.Response:
    kind = "invalid_request_error" if status < BAD_GATEWAY else "upstream_error"
    return web.json_response({"error": {"message": why, "type": kind, "code": status}}, status=status)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m rollout.serve", description="SeRe and PaCoRe as modes of a model.")
    p.add_argument("--model", required=True, help="the model's name at --url; without it a folder or hub id to serve")
    p.add_argument("--name", help="its name for clients; default: as --model")
    p.add_argument("--mode", choices=MODES, default="pacore", help="of requests that name none (default: pacore)")
    p.add_argument("--trajectories", default="16", metavar="PLAN", help="per round, as in 16 (default) or 32,4")
    p.add_argument("--template", type=Path, help="Jinja file that shows messages; default: the model's, or ours")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    p.add_argument("--port", type=int, default=9000)
    add_target_options(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parser().parse_args(arguments)
    return run_command(
        lambda: _main(args), input_errors=(ValueError, FileNotFoundError), failures=(RuntimeError, OSError)
    )


def _main(args: argparse.Namespace) -> int:
    who, plan = target_of(args), plan_of(args.trajectories)
    synthesis = SynthesisPrompt(who.template(args.template))
    with who.served() as url:
        asyncio.run(_serve(args, who.upstream(url, {}), plan, synthesis))
    return DONE


async def _serve(args: argparse.Namespace, connecting: Any, plan: Sequence[int], synthesis: SynthesisPrompt) -> None:
    async with connecting as upstream:
        front = Front(upstream, args.name or args.model, plan, args.mode, synthesis)
        # A client that goes ends its trajectories, and so does the end of the server.
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell starts it in the background
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        runner = web.AppRunner(front.app(), handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, args.host, args.port).start()
            print(f"http://{args.host}:{args.port}/v1 serves {front.name}, {front.name}:sere and {front.name}:pacore")
            await stopped.wait()
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    sys.exit(main())
