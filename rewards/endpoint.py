"""Asks a model behind an OpenAI-compatible URL. Retries failed requests, limits concurrency, parses answers strictly.

To ask a model, a reward declares a parameter of type EndpointName. The value of the parameter is the name of an
endpoint of the recipe (`endpoints: {judge: {url: ..., model: ...}}`). The reward gets the endpoint in its `setup()`:

    self.judge = endpoint(self.name)
    verdict, text = await self.judge.ask(messages, answer=Verdict, max_tokens=512, temperature=1.0, seed=3)
"""

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from rewards.replies import Answer, Unfinished, parsed

if TYPE_CHECKING:
    from openai import APIStatusError

    from rl.config import EndpointOptions

RETRY_S = (0.5, 8.0)
"""The delay in seconds before the first retry, and the maximum delay. The delay doubles with each retry. Up to a
quarter of the delay is subtracted at random."""
MOST_RETRY_AFTER_S = 120.0
"""Maximum wait in seconds if a server sends a Retry-After header."""

_MODERATED = re.compile(r"moderation|flagged|content[ _-]?(?:filter|policy|management)", re.IGNORECASE)
Result = TypeVar("Result")


class Unreachable(Exception):
    """The endpoint does not answer after all retries, or refuses this run's key, model or address. A person can fix
    this while the run waits. `status` is the HTTP status of the last answer, or None if there was no answer.
    `answers_others` is True if the endpoint answered another sample during the last try."""

    def __init__(self, endpoint: str, why: str, status: int | None = None, *, answers_others: bool = False):
        super().__init__(f"endpoint {endpoint}: {why}")
        self.endpoint, self.why, self.status, self.answers_others = endpoint, why, status, answers_others


class Refused(Exception):
    """The endpoint works but refuses this request: by HTTP status 400, 413 or 422, by a content filter, or because the
    context is too long."""


@dataclass(frozen=True)
class _NamesEndpoint:
    """Marks a parameter of type str whose value is the name of an endpoint."""


EndpointName = Annotated[str, _NamesEndpoint()]
"""The type of a reward's parameter whose value is the name of an endpoint of the recipe."""


def is_endpoint_name(annotation: Any) -> bool:
    """True if the type is EndpointName, or a type that contains it, such as EndpointName | None."""
    return any(isinstance(part, _NamesEndpoint) or is_endpoint_name(part) for part in get_args(annotation))


class SampleClock:
    """Measures the time that one sample uses. Waiting for a free slot, or for an endpoint to recover, does not count.

    Set the ContextVar `clock` to this object in the asyncio task that scores the sample. The clock stops while at least
    one `with clock.paused()` block is active.
    """

    def __init__(self) -> None:
        self._used, self._since = 0.0, time.monotonic()
        self._pauses = 0
        self._limit = 0.0
        self._scope: asyncio.Timeout | None = None  # the time limit that limit() sets; None while limit() does not run

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was created, minus the pauses and minus the time that `give_back` subtracted."""
        return self._used + (0.0 if self._pauses else time.monotonic() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock while the with block runs. Pauses may be nested, and pauses of several tasks may overlap."""
        self._used, self._pauses = self.elapsed, self._pauses + 1
        self._reschedule()
        try:
            yield
        finally:
            self._pauses -= 1
            self._since = time.monotonic()
            self._reschedule()

    def give_back(self, seconds: float) -> None:
        """Subtracts time that was lost because of the endpoint, for example by a request that timed out."""
        self._used -= min(seconds, self.elapsed)
        self._reschedule()

    async def limit(self, seconds: float, awaitable: Awaitable[Result]) -> Result:
        """Returns the result of `awaitable`. If `elapsed` exceeds `seconds`, cancels `awaitable` and raises
        TimeoutError."""
        self._limit = seconds
        try:
            async with asyncio.timeout(None) as self._scope:
                self._reschedule()
                return await awaitable
        finally:
            self._scope = None

    def _reschedule(self) -> None:
        if self._scope and not self._scope.expired():
            remaining = self._limit - self.elapsed
            self._scope.reschedule(None if self._pauses else asyncio.get_running_loop().time() + remaining)


clock: ContextVar[SampleClock | None] = ContextVar("clock", default=None)
"""The clock of the sample that is being scored; None outside of a reward process."""


@contextmanager
def waiting() -> Iterator[None]:
    """Stops the current sample's clock while the with block runs. Does nothing if there is no clock."""
    if running := clock.get():
        with running.paused():
            yield
    else:
        yield


@dataclass(frozen=True)
class EndpointSpec:
    """The settings of an endpoint, from `endpoints.NAME` in a recipe."""

    name: str
    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 32  # maximum number of requests at a time
    timeout_s: float = 120.0  # time limit of one request
    retries: int = 5  # maximum retries of one request, for example after HTTP status 429 or 5xx, or after a timeout
    images: bool = False  # True if requests to the model include pictures
    structured: bool = True  # True if the server supports response_format json_schema
    max_wait: float = 3600.0  # if the endpoint does not answer for more than this many seconds, the run stops

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.timeout_s <= 0 or self.retries < 0:
            raise ValueError(
                f"endpoints.{self.name}: concurrency is {self.concurrency} (it must be at least 1), timeout_s is "
                f"{self.timeout_s} (it must be more than 0), retries is {self.retries} (it must be at least 0)"
            )

    @classmethod
    def of(cls, name: str, options: "EndpointOptions") -> "EndpointSpec":
        """Returns the settings of `endpoints.NAME` in a recipe. The url is empty if the run has to serve the
        endpoint."""
        return cls(name=name, url=options.url or "", **options.model_dump(exclude={"url", "serve"}))


_answered: set[str] = set()
_specs: dict[str, EndpointSpec] = {}
_endpoints: dict[str, "Endpoint"] = {}


def configure(specs: Mapping[str, EndpointSpec]) -> None:
    """Sets the endpoints that the rewards of this process can ask. Replaces all endpoints that were set before."""
    _specs.clear()
    _specs.update(specs)
    _endpoints.clear()
    _answered.clear()


def take_answered() -> list[str]:
    """Returns the names of the endpoints that have answered a request since this function was last called."""
    names = sorted(_answered)
    _answered.clear()
    return names


def endpoint(name: str) -> "Endpoint":
    """Returns the endpoint with this name in the recipe. All callers get the same object and share its `concurrency`.

    Raises ValueError if there is no such endpoint, or if the API key of the endpoint is not in the environment.
    """
    if name not in _specs:
        known = ", ".join(sorted(_specs)) or "none"
        raise ValueError(f"no endpoint is called {name!r}; add it under `endpoints:` (there are: {known})")
    if name not in _endpoints:
        _endpoints[name] = Endpoint(_specs[name])
    return _endpoints[name]


@dataclass(frozen=True)
class _Failure:
    """A failed request that may succeed if it is sent again."""

    why: str
    status: int | None = None
    retry_after_s: float | None = None


class Endpoint:
    """A model behind a URL. May be used in one event loop only."""

    def __init__(self, spec: EndpointSpec):
        from openai import AsyncOpenAI  # imported here: the import takes over a second, and only judges need it

        self.spec = spec
        self._key = _key(spec)
        self._slots = asyncio.Semaphore(spec.concurrency)
        # The samples that the endpoint answered last, with the time of the last answer. At most two are kept, because
        # only the last answer to another sample matters.
        self._last_answers: dict[SampleClock | None, float] = {}
        # The client must not retry, because its pauses before retries would count against the sample's time.
        self._client = AsyncOpenAI(base_url=spec.url, api_key=self._key, timeout=spec.timeout_s, max_retries=0)

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]] | Callable[[], Sequence[Mapping[str, Any]]],
        *,
        answer: type[Answer],
        max_tokens: int,
        temperature: float,
        seed: int,
        judged: Sequence[str] = (),
        retries: int | None = None,
    ) -> tuple[Answer, str]:
        """Returns the model's reply as an `answer` object, and as text.

        messages    a chat in OpenAI's format, or a function that makes it. The function is called in a thread when the
                    request is sent. Use a function for large chats, for example for chats with pictures, so that
                    requests that wait for a free slot need no memory for them
        answer      the class of the returned object. The reply must contain one such object (see rewards/replies.py)
        judged      texts in the chat that the model judges; an object that stands in one of them is never the verdict
        retries     maximum number of retries; by default the number of the recipe

        Raises Unparsable if the reply has no such object or several, Refused if the endpoint refuses this request, and
        Unreachable after the last retry. The sample's `clock` does not count the wait for a free slot, the wait before
        a retry, or the time of requests that failed because of the endpoint.
        """
        request: dict[str, Any] = {
            "model": self.spec.model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if self.spec.structured:
            schema = {"name": answer.__name__, "schema": answer.model_json_schema(), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        most = self.spec.retries if retries is None else retries
        text = await self._retried(messages if callable(messages) else lambda: messages, request, most)
        return parsed(text, answer, judged), text

    async def _retried(
        self, messages: Callable[[], Sequence[Mapping[str, Any]]], request: Mapping[str, Any], retries: int
    ) -> str:
        tries = 0
        while True:
            tries += 1
            async with self._slot():
                started, began = running.elapsed if (running := clock.get()) else 0.0, time.monotonic()
                try:
                    reply = await self._once({**request, "messages": await asyncio.to_thread(messages)})
                except Unreachable as e:
                    e.answers_others = self._answers_others(began)
                    raise
            if isinstance(reply, str):
                return reply
            if running:
                running.give_back(running.elapsed - started)
            if tries > retries:
                why = f"{reply.why}, after {tries} tries"
                raise Unreachable(self.spec.name, why, reply.status, answers_others=self._answers_others(began))
            with waiting():
                await asyncio.sleep(_delay(tries, reply.retry_after_s))

    def _note_answer(self) -> None:
        """Notes that the endpoint has answered a request of the current sample."""
        _answered.add(self.spec.name)
        sample = clock.get()
        self._last_answers.pop(sample, None)
        self._last_answers[sample] = time.monotonic()
        if len(self._last_answers) > 2:
            del self._last_answers[next(iter(self._last_answers))]

    def _answers_others(self, since: float) -> bool:
        """True if the endpoint has answered another sample after `since`, a time of time.monotonic()."""
        return any(at > since for sample, at in self._last_answers.items() if sample is not clock.get())

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        with waiting():
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def _once(self, request: Mapping[str, Any]) -> str | _Failure:
        """Sends the request once. Returns the reply's text. If the request failed and a retry may help, returns the
        failure. If no retry can help, raises the error."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError
        from openai.types.chat import ChatCompletion

        try:
            # The client's own timeout applies to each read, so a server that sends slowly could occupy the slot
            # forever.
            async with asyncio.timeout(self.spec.timeout_s):
                completion = await self._client.chat.completions.create(**request)
        except (TimeoutError, APITimeoutError):
            return _Failure(f"no answer from {self.spec.url} within {self.spec.timeout_s:g} s")
        except APIConnectionError as e:
            return _Failure(f"no connection to {self.spec.url}: {self._public(e.__cause__ or e)}")
        except APIStatusError as e:
            return self._on_status(e)
        except (OpenAIError, json.JSONDecodeError) as e:
            return _Failure(f"{self.spec.url} sent an answer that is no chat completion: {self._public(e)}")
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            return _Failure(f"{self.spec.url} sent an answer that is no chat completion: {self._public(completion)}")
        self._note_answer()
        choice = completion.choices[0]
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            raise Refused(
                f"the model withheld its reply: {self._public(choice.message.refusal or choice.finish_reason)}"
            )
        if choice.finish_reason == "length":
            raise Unfinished(f"the model did not finish its reply within {request['max_tokens']} tokens")
        return choice.message.content or ""

    def _on_status(self, error: "APIStatusError") -> _Failure:
        """If a retry may help, returns the failure; otherwise raises Refused or Unreachable."""
        status = error.status_code
        message = self._public(error.message.removeprefix(f"Error code: {status} - "))
        if status in (400, 413, 422) or (status == 403 and _MODERATED.search(message)):
            self._note_answer()
            raise Refused(f"HTTP {status}: {message}") from None
        if status in (408, 409, 429) or status >= 500:
            return _Failure(f"HTTP {status}: {message}", status, _retry_after(error.response.headers))
        key = f"the key in {self.spec.api_key_env}" if self.spec.api_key_env else "api_key_env (none is set)"
        why = f"HTTP {status}: {message}; check {key}, the url {self.spec.url} and the model {self.spec.model}"
        raise Unreachable(self.spec.name, why, status) from None

    def _public(self, message: object) -> str:
        """Shortens a message and removes the API key, because some servers repeat the key in their errors."""
        text = str(message).replace(self._key, "[key]") if self.spec.api_key_env else str(message)
        return " ".join(text[:1000].split())[:300] or type(message).__name__


def _key(spec: EndpointSpec) -> str:
    """Returns the API key from the environment, or a placeholder for the client if the endpoint needs no key."""
    if spec.api_key_env is None:
        return "none"
    key = os.environ.get(spec.api_key_env, "")
    if not key:
        raise ValueError(f"endpoint {spec.name}: environment variable {spec.api_key_env} has no API key; export it")
    return key


def _delay(tries: int, retry_after_s: float | None) -> float:
    if retry_after_s is not None:
        return min(retry_after_s, MOST_RETRY_AFTER_S)
    return min(RETRY_S[0] * 2 ** min(tries - 1, 30), RETRY_S[1]) * random.uniform(0.75, 1.0)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns how many seconds to wait according to the Retry-After header. The header has a number or a date."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
