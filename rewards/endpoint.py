"""Asking a model behind an OpenAI-compatible URL: retries, a limit on requests under way, strictly parsed answers.

Rewards name an endpoint of the recipe (`endpoints: {judge: {url: ..., model: ...}}`) by a parameter of type
EndpointName, and get it in their `setup()`:

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
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from openai import APIStatusError

RETRY_S = (0.5, 8.0)
"""Seconds before the first retry, and at most before any; doubled each time, less up to a quarter at random."""
MOST_RETRY_AFTER_S = 120.0
"""The longest a server's Retry-After is followed."""

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_MODERATED = re.compile(r"moderation|flagged|content[ _-]?(?:filter|policy|management)", re.IGNORECASE)
Answer = TypeVar("Answer", bound=BaseModel)
Result = TypeVar("Result")


class Unreachable(Exception):
    """The endpoint stays away after all retries, or refuses this run's key, model or address: something that a
    person can put right while the run waits. `status` is the HTTP status it last answered with, if it did."""

    def __init__(self, endpoint: str, why: str, status: int | None = None):
        super().__init__(f"endpoint {endpoint}: {why}")
        self.endpoint, self.why, self.status = endpoint, why, status


class Refused(Exception):
    """The endpoint is up but won't answer this request: HTTP 400, 413 or 422, a content filter, a context that is
    too long."""


class Unparsable(Exception):
    """The model answered, but not with the object that was asked for and nothing else."""


@dataclass(frozen=True)
class _NamesEndpoint:
    """The mark that makes a text parameter the name of an endpoint."""


EndpointName = Annotated[str, _NamesEndpoint()]
"""Annotation of a reward's parameter that names an endpoint of the recipe."""


def is_endpoint_name(annotation: Any) -> bool:
    """Whether a parameter of this type names an endpoint; also EndpointName | None and the like."""
    return any(isinstance(part, _NamesEndpoint) or is_endpoint_name(part) for part in get_args(annotation))


class SampleClock:
    """Time that one sample has used, without the time it only waited for its turn or for an endpoint to recover.

    Set as `clock` in the task that scores the sample. While any part of the sample is paused, the clock stands.
    """

    def __init__(self) -> None:
        self._used, self._since = 0.0, time.monotonic()
        self._pauses = 0
        self._limit = 0.0
        self._scope: asyncio.Timeout | None = None  # while limit() runs

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made, except pauses and what was given back."""
        return self._used + (0.0 if self._pauses else time.monotonic() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count. Pauses may nest, and overlap between tasks."""
        self._used, self._pauses = self.elapsed, self._pauses + 1
        self._reschedule()
        try:
            yield
        finally:
            self._pauses -= 1
            self._since = time.monotonic()
            self._reschedule()

    def give_back(self, seconds: float) -> None:
        """Takes off time that turned out to be the endpoint's fault, such as a request that timed out."""
        self._used -= min(seconds, self.elapsed)
        self._reschedule()

    async def limit(self, seconds: float, awaitable: Awaitable[Result]) -> Result:
        """What `awaitable` returns. Raises TimeoutError, and cancels it, once `elapsed` exceeds `seconds`."""
        self._limit = seconds
        try:
            async with asyncio.timeout(None) as self._scope:
                self._reschedule()
                return await awaitable
        finally:
            self._scope = None

    def _reschedule(self) -> None:
        if self._scope and not self._scope.expired():
            left = self._limit - self.elapsed
            self._scope.reschedule(None if self._pauses else asyncio.get_running_loop().time() + left)


clock: ContextVar[SampleClock | None] = ContextVar("clock", default=None)
"""The clock of the sample that is being scored; None where nobody counts."""


@contextmanager
def waiting() -> Iterator[None]:
    """Time inside does not count against the sample's limit."""
    if running := clock.get():
        with running.paused():
            yield
    else:
        yield


@dataclass(frozen=True)
class EndpointSpec:
    """What a recipe's `endpoints.NAME` says."""

    name: str
    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 32  # requests under way at a time
    timeout_s: float = 120.0  # per request
    retries: int = 5  # of one request, after 429, 5xx, a timeout or a broken connection
    images: bool = False  # whether the model is shown pictures
    structured: bool = True  # whether the server honours response_format json_schema
    max_wait: float = 3600.0  # seconds that samples wait for it when it stays away, before that ends the run

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.timeout_s <= 0 or self.retries < 0:
            raise ValueError(
                f"endpoints.{self.name}: concurrency is {self.concurrency} (at least 1), timeout_s {self.timeout_s} "
                f"(more than 0), retries {self.retries} (at least 0)"
            )


_specs: dict[str, EndpointSpec] = {}
_endpoints: dict[str, "Endpoint"] = {}


def configure(specs: Mapping[str, EndpointSpec]) -> None:
    """Makes these the endpoints that rewards of this process find by name, and forgets all others."""
    _specs.clear()
    _specs.update(specs)
    _endpoints.clear()


def endpoint(name: str) -> "Endpoint":
    """The endpoint a recipe calls `name`; one for all who ask, so that they share its limit.

    Raises ValueError if there is none or its key is not in the environment.
    """
    if name not in _specs:
        known = ", ".join(sorted(_specs)) or "none"
        raise ValueError(f"no endpoint is called {name!r}; add it under `endpoints:` (there are: {known})")
    if name not in _endpoints:
        _endpoints[name] = Endpoint(_specs[name])
    return _endpoints[name]


@dataclass(frozen=True)
class _Failure:
    """A request that may succeed if it is made again."""

    why: str
    status: int | None = None
    retry_after_s: float | None = None


class Endpoint:
    """A model behind a URL. Belongs to the event loop that first asks it."""

    def __init__(self, spec: EndpointSpec):
        from openai import AsyncOpenAI  # takes over a second, which only runs that ask a judge should spend

        self.spec = spec
        self._key = _key(spec)
        self._slots = asyncio.Semaphore(spec.concurrency)
        # The client's own retries sleep out of sight (with fixed delays), so they would count against the sample.
        self._client = AsyncOpenAI(base_url=spec.url, api_key=self._key, timeout=spec.timeout_s, max_retries=0)

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer: type[Answer],
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> tuple[Answer, str]:
        """The model's reply as an `answer`, and as it was written.

        messages    a chat in OpenAI's form
        answer      the object wanted; the whole reply has to be its JSON, but for one ```json fence around it

        Raises Unparsable if the reply is anything else, Refused if the endpoint won't answer this request, and
        Unreachable after the last retry. Queueing, waiting to retry, and tries that failed for the endpoint's
        reasons do not count against the sample's `clock`.
        """
        request: dict[str, Any] = {
            "model": self.spec.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if self.spec.structured:
            schema = {"name": answer.__name__, "schema": answer.model_json_schema(), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        text = await self._retried(request)
        return parsed(text, answer), text

    async def _retried(self, request: Mapping[str, Any]) -> str:
        tries = 0
        while True:
            tries += 1
            async with self._slot():
                started = running.elapsed if (running := clock.get()) else 0.0
                reply = await self._once(request)
            if isinstance(reply, str):
                return reply
            if running:
                running.give_back(running.elapsed - started)
            if tries > self.spec.retries:
                raise Unreachable(self.spec.name, f"{reply.why}, after {tries} tries", reply.status)
            with waiting():
                await asyncio.sleep(_delay(tries, reply.retry_after_s))

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        with waiting():
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def _once(self, request: Mapping[str, Any]) -> str | _Failure:
        """The reply's text, or a failure that another try may mend."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError
        from openai.types.chat import ChatCompletion

        try:
            # The client's timeout is per read; a server that trickles would keep the slot for ever.
            async with asyncio.timeout(self.spec.timeout_s):
                completion = await self._client.chat.completions.create(**request)
        except (TimeoutError, APITimeoutError):
            return _Failure(f"no answer from {self.spec.url} within {self.spec.timeout_s:g} s")
        except APIConnectionError as e:
            return _Failure(f"no connection to {self.spec.url}: {self._public(e.__cause__ or e)}")
        except APIStatusError as e:
            return self._status(e)
        except (OpenAIError, json.JSONDecodeError) as e:
            return _Failure(f"{self.spec.url} answered with no chat completion: {self._public(e)}")
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            return _Failure(f"{self.spec.url} answered with no chat completion: {self._public(completion)}")
        choice = completion.choices[0]
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            raise Refused(f"withheld its reply: {self._public(choice.message.refusal or choice.finish_reason)}")
        if choice.finish_reason == "length":
            raise Unparsable(f"did not finish its reply within {request['max_tokens']} tokens")
        return choice.message.content or ""

    def _status(self, error: "APIStatusError") -> _Failure:
        status = error.status_code
        said = self._public(error.message.removeprefix(f"Error code: {status} - "))
        if status in (400, 413, 422) or (status == 403 and _MODERATED.search(said)):
            raise Refused(f"HTTP {status}: {said}") from None
        if status in (408, 409, 429) or status >= 500:
            return _Failure(f"HTTP {status}: {said}", status, _retry_after(error.response.headers))
        key = f"the key in {self.spec.api_key_env}" if self.spec.api_key_env else "api_key_env (none is set)"
        why = f"HTTP {status}: {said}; check {key}, the url {self.spec.url} and the model {self.spec.model}"
        raise Unreachable(self.spec.name, why, status) from None

    def _public(self, said: object) -> str:
        """A short form of what someone said, without the key, which some servers repeat."""
        text = str(said).replace(self._key, "[key]") if self.spec.api_key_env else str(said)
        return " ".join(text[:1000].split())[:300] or type(said).__name__


def _key(spec: EndpointSpec) -> str:
    """The key from the environment; a placeholder (the client insists on one) for servers that want none."""
    if spec.api_key_env is None:
        return "none"
    key = os.environ.get(spec.api_key_env, "")
    if not key:
        raise ValueError(f"endpoint {spec.name}: the environment variable {spec.api_key_env} holds no key; export it")
    return key


def _delay(tries: int, retry_after_s: float | None) -> float:
    if retry_after_s is not None:
        return min(retry_after_s, MOST_RETRY_AFTER_S)
    return min(RETRY_S[0] * 2 ** min(tries - 1, 30), RETRY_S[1]) * random.uniform(0.75, 1.0)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait, which it may write as a number or as a date."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def parsed(text: str, answer: type[Answer]) -> Answer:
    """`text` as an `answer`. Raises Unparsable unless all of it, but for one ```json fence, is its JSON."""
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        return answer.model_validate_json(fenced[1] if fenced else text, strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Unparsable(f"replied with no {answer.__name__}: {place + ': ' if place else ''}{first['msg']}") from None
