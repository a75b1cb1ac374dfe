"""The data types of a run: Prompt -> Rollout -> Scored -> Batch -> Targets. Values are complete when they are made.

This file imports no torch, ray or vllm, so that rewards and data code can import it anywhere. Batch and Targets are in
rl/learner.
"""

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

Finish = Literal["stop", "length"]
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
SYNTHESIS_TEMPLATE = "pacore.jinja"
"""The file in a model folder with the template that the model was trained with for pooled answers."""
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def answer_of(text: str) -> str:
    """Returns a response's final answer, stripped: the text after the last `</think>`; the whole text if there is no
    think tag; "" if the thinking was not closed."""
    if THINK_CLOSE in text:
        return text.rpartition(THINK_CLOSE)[2].strip()
    return "" if THINK_OPEN in text else text.strip()


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt, by reference (a file) or by value (encoded bytes).

    `digest` is the SHA-256 of the encoded bytes and identifies the picture: two rows that show the same picture share
    one entry in the learner's feature cache.
    """

    source: Path | bytes
    digest: str

    @classmethod
    def of(cls, source: str | Path | bytes) -> "Picture":
        """Returns the picture in a file or in encoded bytes. Raises FileNotFoundError if the file does not exist."""
        if not isinstance(source, bytes):
            source = Path(source).resolve()
        data = source if isinstance(source, bytes) else source.read_bytes()
        return cls(source, hashlib.sha256(data).hexdigest())

    def load(self) -> Image.Image:
        """Returns the decoded picture, RGB."""
        data = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with Image.open(data) as image:
            return image.convert("RGB")

    @property
    def data_url(self) -> str:
        """The encoded picture as a data: URL, converted to PNG if servers may not read its format."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format
        if kind not in WEB_FORMATS:
            png = io.BytesIO()
            self.load().save(png, "PNG")
            kind, data = "PNG", png.getvalue()
        return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, read from the header."""
        data = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with Image.open(data) as image:
            return image.size


@dataclass(frozen=True)
class PooledAnswers:
    """Final answers of earlier attempts that a prompt shows to the policy, in this order."""

    texts: tuple[str, ...]
    accepted: tuple[bool, ...] | None = None  # which of them are correct; None if unknown


@dataclass(frozen=True)
class Prompt:
    """One validated data row. `messages` is a chat; its image parts are `{"type": "image"}` placeholders, in the order
    of `images`."""

    id: str
    task: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Picture, ...] = ()
    ground_truth: Any = None
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages_pool: tuple[str, ...] = ()  # final answers of earlier attempts, for PaCoRe
    pool_accuracy: float | None = None  # share of the pool that was accepted
    pool_accepted: tuple[bool, ...] = ()  # which of the pool were accepted; () if unknown
    shown: PooledAnswers | None = None  # the pooled answers that the policy sees with the problem


@dataclass(frozen=True)
class Rollout:
    """One sampled response: P prompt tokens (image slots expanded), R response tokens, all chosen by the policy."""

    prompt: Prompt
    text: str  # response_ids decoded without special tokens; think tags are kept
    finish: Finish = "stop"
    prompt_ids: tuple[int, ...] = ()  # [P]
    response_ids: tuple[int, ...] = ()  # [R]; ends in an end-of-sequence token unless finish == "length"
    rollout_logprobs: tuple[float, ...] = ()  # [R] nats, from the engine that sampled it
    policy_step: int = 0  # number of updates of the weights that sampled it, or its first piece
    pieces: tuple[tuple[int, int], ...] = ()  # (policy_step, tokens) of each piece, if sampled in pieces

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(policy_step, tokens) of every piece; a response that was not sampled in pieces is one."""
        return self.pieces or ((self.policy_step, len(self.response_ids)),)

    @property
    def reasoning(self) -> str:
        """The stripped text before the last `</think>`, without `<think>`; "" if the response has no think tag."""
        if THINK_CLOSE in self.text:
            before = self.text.rpartition(THINK_CLOSE)[0]
        elif THINK_OPEN in self.text:
            before = self.text
        else:
            return ""
        return before.strip().removeprefix(THINK_OPEN).strip()

    @property
    def answer(self) -> str:
        """The final answer, see `answer_of`."""
        return answer_of(self.text)


@dataclass(frozen=True)
class Scored:
    """A rollout and its reward.

    `reward` is the number that PPO maximises; it is used only if `invalid` is None. `parts` has one number per
    component reward, `details` everything else that the rewards recorded; both can be written as JSON. `seconds` is
    the duration of the scoring.
    """

    rollout: Rollout
    reward: float
    invalid: str | None = None  # why the sample is not used in the loss; never because of the response's text
    parts: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class RowScore:
    """A row judge's value for one data row, 0 to 1; it counts only when `invalid` is None. Fields as in Scored."""

    value: float
    invalid: str | None = None  # why there is no value
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """A request to an engine: a single response to a tokenised prompt with one image token per picture."""

    prompt_ids: tuple[int, ...]
    images: tuple[Picture, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0 is greedy; greedy and sampled requests never share a generate() call


@dataclass(frozen=True)
class Completion:
    """An engine's answer to a Request: expanded prompt ids, sampled ids, and the logprob of each sampled id (nats)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
