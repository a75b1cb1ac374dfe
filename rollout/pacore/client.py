"""The client of a vLLM endpoint. It limits the number of simultaneous requests, sends urgent requests first, and
retries failed requests."""

import asyncio
import heapq
import itertools
import json
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp

from rl.types import THINK_CLOSE, THINK_OPEN
from rollout.pacore.prompt import Chat
from rollout.pacore.rounds import PromptTooLong, Reply

RETRY_S = (0.5, 30.0)
"""The waiting time before the first retry, and the maximum waiting time, in seconds. The waiting time doubles
with each retry. Up to a quarter of it is subtracted at random, so that many clients do not come back at once."""
IDLE_S = 3600.0
"""Maximum time in seconds in which an endpoint sends nothing. A single response may take an hour."""
PROBES_S = (60, 15, 4)
"""TCP keepalive: seconds without data before the first probe, seconds between probes, number of probes. If the network
to the endpoint is broken, this shows it after two minutes."""
ROW_STATUSES = (400, 413, 422)
"""The HTTP statuses with which an endpoint refuses one request. Other error statuses concern all requests."""
TOO_LONG_MESSAGES = ("maximum context length", "max_tokens must be at least 1", "longer than the maximum model length")
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
GREEDY = 1e-5  # vLLM samples greedily at temperatures below this value
KEEP_ALIVE_S = 4.0  # vLLM closes idle connections after 5 seconds
Answer = TypeVar("Answer")
FULL_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Request fields that override the sampling defaults of the model's folder. With these fields, every token can be
sampled."""


class EndpointUnreachable(RuntimeError):
    """Raised if an endpoint does not answer, even after all retries, or if it returns a wrong number of replies."""


class NoAnswer(RuntimeError):
    """Raised if an endpoint never answers one request, although it answers another request."""


class RequestRefused(RuntimeError):
    """Raised if an endpoint answers a request with an error status. `body` is the text of the answer."""

    def __init__(self, url: str, status: int, body: str) -> None:
        super().__init__(f"{url} answers {status}: {body[:500]}")
        self.status, self.body = status, body

    @property
    def only_this(self) -> bool:
        """True if the endpoint refuses only this request, not all requests."""
        return self.status in ROW_STATUSES


class PrioritySemaphore:
    """Limits the number of replies that are requested at the same time. The waiting request with the highest urgency is
    sent next. Among requests of the same urgency, the oldest request is sent first."""

    def __init__(self, count: int) -> None:
        self._total = self._free = count
        self._numbers = itertools.count()  # numbers the requests in the order of their arrival
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def acquire(self, urgency: int, count: int = 1) -> AsyncIterator[None]:
        """A context manager that waits until enough slots are free, and then occupies one slot for each of the `count`
        replies. If the semaphore has fewer than `count` slots in total, all slots are occupied."""
        count = min(count, self._total)
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-urgency, next(self._numbers), count, turn))
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += count  # the slots were granted just before the cancellation
            self._grant()  # the cancelled request may have blocked smaller requests
            raise
        try:
            yield
        finally:
            self._free += count
            self._grant()

    def _grant(self) -> None:
        while self._waiting:
            _, _, count, turn = self._waiting[0]
            if not turn.done():
                if count > self._free:
                    return
                self._free -= count
                turn.set_result(None)
            heapq.heappop(self._waiting)


class EndpointClient:
    """Calls a model behind an OpenAI-compatible URL such as http://host:8000/v1. The client must be used inside
    `async with`.

    Args:
        concurrency: maximum number of replies that are requested at the same time.
        retries: number of retries after status 429, 5xx or a broken connection.
        fields: fields that are added to every request: temperature, max_tokens, ...
        key_env: name of the environment variable that contains the endpoint's key, if the endpoint needs a key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 256,
        retries: int = 5,
        fields: Mapping[str, Any] | None = None,
        key_env: str | None = None,
    ) -> None:
        self.url, self.model, self.retries = url.rstrip("/"), model, retries
        self.fields = {"temperature": 1.0, **FULL_DISTRIBUTION, **(fields or {})}
        self._slots, self._session = PrioritySemaphore(concurrency), None
        if key_env is not None and not os.environ.get(key_env):
            raise ValueError(f"the environment variable {key_env} is not set; it must contain the key of {url}")
        self._headers = {"Authorization": f"Bearer {os.environ[key_env]}"} if key_env else {}

    _session: aiohttp.ClientSession | None

    async def __aenter__(self) -> "EndpointClient":
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=IDLE_S)
        connector = aiohttp.TCPConnector(  # self._slots limits the requests
            limit=0, keepalive_timeout=KEEP_ALIVE_S, socket_factory=_probed_socket
        )
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("EndpointClient can only be used inside `async with`")
        return self._session

    async def __call__(self, chat: Chat, seed: int, urgency: int, count: int = 1) -> list[Reply]:
        """Returns `count` replies to a chat. Raises the same errors as `replies`."""
        return await self.replies({**self.fields, "messages": list(chat), "seed": seed}, urgency, count)

    async def replies(self, body: Mapping[str, Any], urgency: int, count: int) -> list[Reply]:
        """Returns `count` replies to a chat completion request.

        Raises: PromptTooLong, RequestRefused, NoAnswer, EndpointUnreachable.
        """
        # vLLM refuses greedy requests with n > 1.
        if count > 1 and body.get("temperature") is not None and float(body["temperature"]) < GREEDY:
            single = await asyncio.gather(*(self.replies(body, urgency, 1) for _ in range(count)))
            return [reply for (reply,) in single]
        count_fields = {"n": count, "return_token_ids": True} if count > 1 else {}
        replies = parse_replies(await self.complete({**body, **count_fields}, urgency))
        if len(replies) != count:
            raise EndpointUnreachable(
                f"{self.url} returned {len(replies)} replies for n = {count}; is this a vLLM server?"
            )
        return replies

    async def complete(self, body: Mapping[str, Any], urgency: int = 0) -> dict[str, Any]:
        """Returns the endpoint's answer to a chat completion request. Raises the same errors as `replies`."""

        async def attempt() -> dict[str, Any]:
            answer = await self._post(body)
            async with answer:
                return json.loads(await answer.text())

        async with self._slots.acquire(urgency, _reply_count(body)):
            return await self._retry(attempt)

    @asynccontextmanager
    async def stream(self, body: Mapping[str, Any], urgency: int = 0) -> AsyncIterator[aiohttp.StreamReader]:
        """A context manager that yields the endpoint's stream of events. The request is retried until a stream begins.

        Raises: the same errors as `replies`, and aiohttp.ClientError if the stream breaks.
        """
        async with self._slots.acquire(urgency, _reply_count(body)):
            answer = await self._retry(lambda: self._post({**body, "stream": True}))
            async with answer:
                yield answer.content

    async def works(self) -> bool:
        """True if the endpoint lists its models."""
        try:
            async with self.session.get(f"{self.url}/models", timeout=aiohttp.ClientTimeout(total=10)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return False

    async def _answers_others(self) -> bool:
        """True if the endpoint answers a very short request."""
        try:
            short = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            async with asyncio.timeout(60), await self._post(short):
                return True
        except (aiohttp.ClientError, TimeoutError, ConnectionError, RequestRefused, PromptTooLong):
            return False

    async def _retry(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        for number in itertools.count():
            busy = False
            try:
                return await attempt()
            except (aiohttp.ClientError, TimeoutError, ConnectionError, json.JSONDecodeError) as error:
                reason = f"{type(error).__name__}: {error}"
            except RequestRefused as refused:
                if refused.status != 429 and refused.status < 500:
                    raise
                reason, busy = str(refused), refused.status == 429
            if number > self.retries:  # the endpoint has answered another request since the last regular try
                raise NoAnswer(
                    f"{self.url} answers other requests, but not this one after {number + 1} tries ({reason})"
                )
            if number == self.retries and (busy or not await self._answers_others()):
                raise EndpointUnreachable(f"{self.url} does not answer after {number + 1} tries ({reason})")
            await asyncio.sleep(min(RETRY_S[0] * 2**number, RETRY_S[1]) * random.uniform(0.75, 1.0))
        raise AssertionError

    async def _post(self, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        """Sends a request and returns the answer, whose body is not read yet. Raises: PromptTooLong, RequestRefused."""
        answer = await self.session.post(f"{self.url}/chat/completions", json={**body, "model": self.model})
        if answer.status == 200:
            return answer
        async with answer:
            text = await answer.text()
        if answer.status != 400 or not any(message in text for message in TOO_LONG_MESSAGES):
            raise RequestRefused(self.url, answer.status, text)
        unlimited = {name: value for name, value in body.items() if name not in TOKEN_LIMITS}
        if len(unlimited) < len(body):  # the prompt alone may be short enough: retry without the token limits
            return await self._post(unlimited)
        raise PromptTooLong(text)


def _probed_socket(address: Any) -> socket.socket:
    """Returns a socket that notices with TCP keepalive if the network is broken."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), PROBES_S, strict=True):
        if hasattr(socket, option):  # macOS lacks TCP_KEEPIDLE before Python 3.13
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


def _reply_count(body: Mapping[str, Any]) -> int:
    """Returns the number of replies that a request asks for, or 1 if that number is invalid. The endpoint refuses a
    request with an invalid number."""
    count = body.get("n")
    return count if isinstance(count, int) and count > 0 else 1


def parse_replies(answer: Mapping[str, Any]) -> list[Reply]:
    """Returns the choices of a chat completion as replies. If a choice has no token ids, the reply's number of tokens
    is a mean: the number of all sampled tokens divided by the number of choices."""
    choices, usage = answer["choices"], answer.get("usage") or {}
    mean = int(usage.get("completion_tokens") or 0) / len(choices)
    prompt = int(usage.get("prompt_tokens") or 0)
    ordered = sorted(choices, key=lambda choice: choice.get("index") or 0)
    return [_reply(choice, len(choice.get("token_ids") or ()) or round(mean), prompt) for choice in ordered]


def _reply(choice: Mapping[str, Any], tokens: int, prompt_tokens: int) -> Reply:
    """Returns the reply including its thinking, even if the server's reasoning parser put the thinking into another
    field."""
    message = choice["message"]
    text = message.get("content") or ""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if thinking:
        text = f"{THINK_OPEN}{thinking}{THINK_CLOSE}{text}" if text else f"{THINK_OPEN}{thinking}"
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Reply(text, finish, tokens, prompt_tokens)
