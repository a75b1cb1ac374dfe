"""A vLLM endpoint that is asked over HTTP: as many chats at once as it can take, the most urgent first."""

import asyncio
import heapq
import itertools
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp

from rl.types import THINK_CLOSE, THINK_OPEN
from rollout.pacore.rounds import Reply, TooLong, Turns

RETRY_S = (0.5, 30.0)
"""Seconds before the first retry, and at most before any; doubled each time."""
NO_ROOM = ("maximum context length", "max_tokens must be at least 1", "longer than the maximum model length")
CAPS = ("max_tokens", "max_completion_tokens")
GREEDY = 1e-5  # temperatures below it, to vLLM
KEEP_ALIVE_S = 4.0  # vLLM closes idle connections after 5
Answer = TypeVar("Answer")
WHOLE = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What samples from the whole distribution, whatever defaults the server found in the model's folder."""


class Unreachable(RuntimeError):
    """The endpoint does not answer, after all retries."""


class Refused(RuntimeError):
    """The endpoint answers with an error. `body` is its answer."""

    def __init__(self, url: str, status: int, body: str) -> None:
        super().__init__(f"{url} answers {status}: {body[:500]}")
        self.status, self.body = status, body


class Slots:
    """At most so many at a time; of those that wait, the one with the highest urgency is next, then the first."""

    def __init__(self, count: int) -> None:
        self._all = self._free = count
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def take(self, urgency: int, count: int = 1) -> AsyncIterator[None]:
        """So many slots, all of them at most, for the time of the context."""
        count = min(count, self._all)
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-urgency, next(self._order), count, turn))
        self._hand_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += count  # they came just now, and are not wanted any more
            self._hand_on()  # it may have kept others waiting
            raise
        try:
            yield
        finally:
            self._free += count
            self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting:
            _, _, count, turn = self._waiting[0]
            if not turn.done():
                if count > self._free:
                    return
                self._free -= count
                turn.set_result(None)
            heapq.heappop(self._waiting)


class EndpointClient:
    """A model behind an OpenAI-compatible URL such as http://host:8000/v1. An async context.

    Args:
        slots: replies under way at a time.
        retries: further attempts after 429, 5xx or a broken connection.
        fields: of every request: temperature, max_tokens, ...
        key_env: environment variable that holds the key, if it needs one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        slots: int = 256,
        retries: int = 5,
        fields: Mapping[str, Any] | None = None,
        key_env: str | None = None,
    ) -> None:
        self.url, self.model, self.retries = url.rstrip("/"), model, retries
        self.fields = {"temperature": 1.0, **WHOLE, **(fields or {})}
        self._slots, self._session = Slots(slots), None
        if key_env is not None and not os.environ.get(key_env):
            raise ValueError(f"the environment has no {key_env}, which should hold the key of {url}")
        self._headers = {"Authorization": f"Bearer {os.environ[key_env]}"} if key_env else {}

    _session: aiohttp.ClientSession | None

    async def __aenter__(self) -> "EndpointClient":
        unlimited = aiohttp.ClientTimeout(total=None, sock_connect=30)  # a chain of thought may take an hour
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)  # the slots are the limit
        self._session = aiohttp.ClientSession(timeout=unlimited, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("EndpointClient is used inside `async with` only")
        return self._session

    async def __call__(self, turns: Turns, seed: int, urgency: int, count: int = 1) -> list[Reply]:
        """Several replies by one request, whose prompt is read once. Raises: TooLong, Refused, Unreachable."""
        return await self.ask({**self.fields, "messages": list(turns), "seed": seed}, urgency, count)

    async def ask(self, body: Mapping[str, Any], urgency: int, count: int) -> list[Reply]:
        """`count` replies to a chat completion's request. Raises: TooLong, Refused, Unreachable."""
        if count > 1 and body.get("temperature") is not None and float(body["temperature"]) < GREEDY:
            same = await asyncio.gather(*(self.ask(body, urgency, 1) for _ in range(count)))  # vLLM refuses n here
            return [reply for (reply,) in same]
        several = {"n": count, "return_token_ids": True} if count > 1 else {}
        replies = replies_of(await self.complete({**body, **several}, urgency))
        if len(replies) != count:
            raise Unreachable(f"{self.url} gives {len(replies)} replies where n = {count} were asked for; is it vLLM?")
        return replies

    async def complete(self, body: Mapping[str, Any], urgency: int = 0) -> dict[str, Any]:
        """The endpoint's answer to a chat completion. Raises: TooLong, Refused, Unreachable."""

        async def whole() -> dict[str, Any]:
            answer = await self._post(body)
            async with answer:
                return json.loads(await answer.text())

        async with self._slots.take(urgency, _replies(body)):
            return await self._retried(whole)

    @asynccontextmanager
    async def stream(self, body: Mapping[str, Any], urgency: int = 0) -> AsyncIterator[aiohttp.StreamReader]:
        """The endpoint's events as they come; until they begin there are retries. Raises: TooLong, Refused,
        Unreachable, and aiohttp.ClientError if the stream breaks."""
        async with self._slots.take(urgency, _replies(body)):
            answer = await self._retried(lambda: self._post({**body, "stream": True}))
            async with answer:
                yield answer.content

    async def _retried(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        for number in itertools.count():
            try:
                return await attempt()
            except (aiohttp.ClientError, TimeoutError, ConnectionError, json.JSONDecodeError) as error:
                why = f"{type(error).__name__}: {error}"
            except Refused as refused:
                if refused.status != 429 and refused.status < 500:
                    raise
                why = str(refused)
            if number >= self.retries:
                raise Unreachable(f"{self.url} does not answer after {number + 1} tries ({why})")
            await asyncio.sleep(min(RETRY_S[0] * 2**number, RETRY_S[1]))
        raise AssertionError

    async def _post(self, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        """The endpoint's answer, not read yet. Raises: TooLong, Refused."""
        answer = await self.session.post(f"{self.url}/chat/completions", json={**body, "model": self.model})
        if answer.status == 200:
            return answer
        async with answer:
            told = await answer.text()
        if answer.status != 400 or not any(words in told for words in NO_ROOM):
            raise Refused(self.url, answer.status, told)
        capless = {name: value for name, value in body.items() if name not in CAPS}
        if len(capless) < len(body):  # prompt and cap together have no room, so what is left is less than the cap
            return await self._post(capless)
        raise TooLong(told)


def _replies(body: Mapping[str, Any]) -> int:
    """How many a request asks for; what is no number is the endpoint's to refuse."""
    count = body.get("n")
    return count if isinstance(count, int) and count > 0 else 1


def replies_of(answer: Mapping[str, Any]) -> list[Reply]:
    """The choices of a chat completion. An endpoint that does not tell their token ids only counts all tokens together;
    then each reply has the mean."""
    choices, usage = answer["choices"], answer.get("usage") or {}
    mean = int(usage.get("completion_tokens") or 0) / len(choices)
    prompt = int(usage.get("prompt_tokens") or 0)
    ordered = sorted(choices, key=lambda choice: choice.get("index") or 0)
    return [_reply(choice, len(choice.get("token_ids") or ()) or round(mean), prompt) for choice in ordered]


def _reply(choice: Mapping[str, Any], tokens: int, prompt_tokens: int) -> Reply:
    """What a server's reasoning parser took apart is put together again."""
    message = choice["message"]
    text = message.get("content") or ""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if thinking:
        text = f"{THINK_OPEN}{thinking}{THINK_CLOSE}{text}" if text else f"{THINK_OPEN}{thinking}"
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Reply(text, finish, tokens, prompt_tokens)
