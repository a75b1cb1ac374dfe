"""The data that flows: Prompt -> Rollout -> Scored -> (packed batch) -> Targets. Each value is finished when made.

Light on purpose: no torch, ray or vllm, so that rewards and data code can import it anywhere.
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
"""The file of a model's folder that shows messages in the words that the model was trained with."""
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def answer_of(text: str) -> str:
    """A response's final answer: what follows the last `</think>`, stripped; all of it if there is no tag; "" if
    thinking never closed."""
    if THINK_CLOSE in text:
        return text.rpartition(THINK_CLOSE)[2].strip()
    return "" if THINK_OPEN in text else text.strip()


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt, by reference (a file) or by value (encoded bytes).

    `digest` is the SHA-256 of the encoded bytes and names the picture everywhere: two rows that show the
    same picture share one entry in the learner's feature cache.
    """

    source: Path | bytes
    digest: str

    @classmethod
    def of(cls, source: str | Path | bytes) -> "Picture":
        """Raises FileNotFoundError if `source` is a path that does not exist."""
        if not isinstance(source, bytes):
            source = Path(source).resolve()
        data = source if isinstance(source, bytes) else source.read_bytes()
        return cls(source, hashlib.sha256(data).hexdigest())

    def load(self) -> Image.Image:
        """The decoded picture, RGB."""
        data = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with Image.open(data) as image:
            return image.convert("RGB")

    @property
    def data_url(self) -> str:
        """The encoded picture as a data: URL, in a format that every server of a vision-language model reads."""
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
    """Final answers of earlier attempts that a prompt shows, in this order."""

    texts: tuple[str, ...]
    accepted: tuple[bool, ...] | None = None  # which are right; None where nobody knows


@dataclass(frozen=True)
class Prompt:
    """One data row, validated. `messages` is a chat whose image parts are `{"type": "image"}` placeholders,
    in the order of `images`."""

    id: str
    task: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Picture, ...] = ()
    ground_truth: Any = None
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages_pool: tuple[str, ...] = ()  # cached final messages, for PaCoRe
    pool_accuracy: float | None = None  # share of them that were accepted
    pool_accepted: tuple[bool, ...] = ()  # which of them were; () where nobody knows
    shown: "PooledAnswers | None" = None  # those that the policy sees with the problem


@dataclass(frozen=True)
class Rollout:
    """One sampled response: P prompt tokens (image slots expanded), R response tokens."""

    prompt: Prompt
    text: str  # response_ids decoded, special tokens that end the turn removed, think tags kept
    finish: Finish = "stop"
    prompt_ids: tuple[int, ...] = ()  # [P]
    response_ids: tuple[int, ...] = ()  # [R]; ends in an end-of-sequence token unless finish == "length"
    rollout_logprobs: tuple[float, ...] = ()  # [R] nats, from the engine that sampled it
    policy_step: int = 0  # updates the weights had seen when they sampled it, or the first piece of it
    pieces: tuple[tuple[int, int], ...] = ()  # (policy_step, tokens) of every piece, if several weights may have

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(policy_step, tokens) of every piece, however many there are."""
        return self.pieces or ((self.policy_step, len(self.response_ids)),)

    @property
    def reasoning(self) -> str:
        """Stripped text before `</think>` (its opening tag removed); "" if the response never thought."""
        if THINK_CLOSE in self.text:
            before = self.text.rpartition(THINK_CLOSE)[0]
        elif THINK_OPEN in self.text:
            before = self.text
        else:
            return ""
        return before.strip().removeprefix(THINK_OPEN).strip()

    @property
    def answer(self) -> str:
        """Stripped text after the last `</think>`; all of it without any tag; "" if thinking never closed."""
        return answer_of(self.text)


@dataclass(frozen=True)
class Scored:
    """A rollout and what its task's rewards said of it.

    `reward` is the number PPO maximises; it counts only when `invalid` is None. `parts` has one number per
    component reward and `details` whatever the rewards recorded, both JSON-able. `seconds` is how long scoring took.
    """

    rollout: Rollout
    reward: float
    invalid: str | None = None  # why the sample is left out of the loss (never because of what the model wrote)
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
    """What one engine is asked for: a single response to a tokenised prompt with one image token per picture."""

    prompt_ids: tuple[int, ...]
    images: tuple[Picture, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0 is greedy; greedy and sampled requests never share a generate() call


@dataclass(frozen=True)
class Completion:
    """What one engine answers: expanded prompt ids, sampled ids and the logprob each was sampled with (nats)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
