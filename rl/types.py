"""Defines the data types of a run, in the order in which a run makes them: Prompt -> Rollout -> Scored -> Batch ->
Targets.

Objects of these types do not change after their creation. This file does not import torch, ray or vllm, so that every
process can import it. Batch and Targets are in rl/learner.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from rl.pixels import as_seen, conversions, orientation, seen_size
from rl.stop import Stop

Finish = Literal["stop", "length"]
Resize = Callable[[tuple[int, int]], tuple[int, int]]
"""(width, height) of a picture in pixels -> another (width, height)."""
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
NEVER_BIAS = -100.0
"""Added to the logits of tokens that a model must never sample. It is the lowest bias that vLLM accepts."""
SYNTHESIS_TEMPLATE = "pacore.jinja"
"""Name of a template file in a model folder. The template combines a problem and earlier answers into one prompt. The
model was trained with prompts from this template."""
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
FORMATS = (*WEB_FORMATS, "BMP", "TIFF")
"""The formats of pictures that are opened. Pillow knows more formats, but some of them start other programs."""
MOST_PIXELS = 64_000_000
"""Maximum number of pixels of a picture. A decoded picture takes three bytes per pixel."""
MOST_PICTURE_BYTES = 512 << 20
"""Maximum size of a picture's file in bytes."""


def answer_of(text: str) -> str:
    """Returns the final answer of a response, without surrounding whitespace. The answer is the text after the last
    `</think>`, or the whole text if there is no think tag. Returns "" if the response has `<think>` but no
    `</think>`."""
    if THINK_CLOSE in text:
        return text.rpartition(THINK_CLOSE)[2].strip()
    return "" if THINK_OPEN in text else text.strip()


class BadPicture(ValueError):
    """A picture has an unknown format, is too large or is damaged."""


class LostPicture(Stop):
    """A picture that could be decoded when the rows were checked cannot be read any more."""


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt, stored as the path of a file or as encoded bytes.

    `digest` is the SHA-256 of the encoded bytes and identifies the picture. Two rows with the same picture share one
    entry in the learner's feature cache. If `upright` is False, the picture is not turned as its EXIF data say. If it
    would have been turned, its digest is another one. `shown` is (width, height) in pixels of the picture after the
    model's own padding and scaling, or None if no model is known.
    """

    source: Path | bytes
    digest: str
    upright: bool = True
    shown: tuple[int, int] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, source: str | Path | bytes, upright: bool = True, shown: Resize | None = None) -> "Picture":
        """Makes a Picture from a file or from encoded bytes. Reads the header first, and then the whole file. The
        function `shown` computes the picture's `shown` from its size.

        Raises: FileNotFoundError if the file does not exist; BadPicture if format or size are not allowed.
        """
        if not isinstance(source, bytes):
            source = Path(source).resolve()
            if (size := source.stat().st_size) > MOST_PICTURE_BYTES:
                raise BadPicture(f"it has {size:,} bytes, more than the maximum of {MOST_PICTURE_BYTES:,}")
        with _opened(source) as image:
            data = source if isinstance(source, bytes) else source.read_bytes()
            lying = b"not turned" if not upright and orientation(image) != 1 else b""
            size = seen_size(image, upright)
        return cls(source, hashlib.sha256(data + lying).hexdigest(), upright, shown(size) if shown else None)

    def check(self) -> tuple[str, ...]:
        """Decodes the picture and discards the pixels. Returns the conversions that `load` makes (see `conversions`).
        Raises BadPicture if the picture cannot be decoded."""
        with _opened(self.source) as image:
            image.draft(None, (1, 1))  # decodes a JPEG at an eighth of its size, which is faster
            made = conversions(image, self.upright)
            image.load()
        return made

    def load(self) -> Image.Image:
        """Returns the decoded picture in RGB, as a person sees it (see `as_seen`). Raises LostPicture if the picture
        cannot be decoded."""
        try:
            with _opened(self.source) as image:
                return as_seen(image, self.upright)
        except (BadPicture, OSError) as problem:
            name = "bytes of a data row" if isinstance(self.source, bytes) else self.source
            raise LostPicture(f"picture {self.digest[:12]} ({name}) cannot be read: {problem}", saves=False) from None

    @property
    def data_url(self) -> str:
        """The encoded picture as a `data:` URL, which every program shows as `load` returns it. A picture is converted
        to PNG if its format is not in WEB_FORMATS, or if `load` makes a conversion."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        with _opened(data) as image:
            kind = image.format
            converted = conversions(image, self.upright) or (not self.upright and orientation(image) != 1)
        if kind not in WEB_FORMATS or converted:
            png = io.BytesIO()
            self.load().save(png, "PNG")
            kind, data = "PNG", png.getvalue()
        return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the picture that `load` returns, read from the header of the file."""
        with _opened(self.source) as image:
            return seen_size(image, self.upright)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """Opens a picture and checks its header. Every error in the `with` block becomes a BadPicture, except if the file
    does not exist or memory runs out."""
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(data, formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= MOST_PIXELS:
                raise BadPicture(f"its size is {width} x {height}, but 1 to {MOST_PIXELS:,} pixels are allowed")
            yield image
    except (BadPicture, FileNotFoundError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadPicture(f"it is no picture in one of the formats {', '.join(FORMATS)}") from None
    except Exception as problem:  # Pillow's decoders raise errors of many classes if a file is damaged
        raise BadPicture(str(problem)) from problem


@dataclass(frozen=True)
class PooledAnswers:
    """Final answers of earlier attempts at a problem. A prompt contains these answers, in this order."""

    texts: tuple[str, ...]
    accepted: tuple[bool, ...] | None = None  # for each text: True if accepted; None if unknown


@dataclass(frozen=True)
class Prompt:
    """One validated data row. `messages` is a chat in which `{"type": "image"}` placeholders stand for the pictures, in
    the order of `images`."""

    id: str
    task: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Picture, ...] = ()
    ground_truth: Any = None
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages_pool: tuple[str, ...] = ()  # final answers of earlier attempts, for PaCoRe
    pool_accuracy: float | None = None  # share of the answers in messages_pool that were accepted
    pool_accepted: tuple[bool, ...] = ()  # for each answer in messages_pool: True if accepted; () if unknown
    shown: PooledAnswers | None = None  # earlier answers that the prompt contains in addition to the problem


@dataclass(frozen=True)
class Rollout:
    """One sampled response. P is the number of prompt tokens, with all image tokens of each picture. R is the number of
    response tokens. The policy sampled all response tokens."""

    prompt: Prompt
    text: str  # decoded response_ids without special tokens, but with think tags
    finish: Finish = "stop"
    prompt_ids: tuple[int, ...] = ()  # [P]
    response_ids: tuple[int, ...] = ()  # [R]; if finish == "stop", the last id is an end-of-sequence token
    rollout_logprobs: tuple[float, ...] = ()  # [R] in nats, from the engine that sampled the response
    policy_step: int = 0  # number of policy updates before sampling of the response began
    pieces: tuple[tuple[int, int], ...] = ()  # the pairs of `steps`; () if there is only one piece
    unusable: str = ""  # why the response cannot be used: its picture could not be read, or it has a forbidden token

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(policy_step, number of tokens) of every piece. A piece is the part of a response that was sampled with the
        same weights. Without partial rollouts, a response is one piece."""
        return self.pieces or ((self.policy_step, len(self.response_ids)),)

    @property
    def reasoning(self) -> str:
        """The text before the last `</think>`, without `<think>` and surrounding whitespace; "" if there is no think
        tag."""
        if THINK_CLOSE in self.text:
            before = self.text.rpartition(THINK_CLOSE)[0]
        elif THINK_OPEN in self.text:
            before = self.text
        else:
            return ""
        return before.strip().removeprefix(THINK_OPEN).strip()

    @property
    def answer(self) -> str:
        """The final answer: the result of `answer_of`."""
        return answer_of(self.text)


@dataclass(frozen=True)
class Scored:
    """A rollout and its reward.

    `reward` is the number that PPO maximises. It is used only if `invalid` is None. `parts` has one number per
    component of the reward, and `details` has everything else that the rewards recorded. `parts` and `details` can be
    written as JSON. `seconds` is the duration of the scoring.
    """

    rollout: Rollout
    reward: float
    invalid: str | None = None  # reason why the loss ignores the sample; never contains the response
    parts: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class RowScore:
    """The value (0 to 1) that a row judge gives to one data row. The value is used only if `invalid` is None. The other
    fields mean the same as in Scored."""

    value: float
    invalid: str | None = None  # reason why the row has no value
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """A request to an engine for a single response to a tokenised prompt. The prompt has one image token per
    picture."""

    prompt_ids: tuple[int, ...]
    images: tuple[Picture, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0: greedy decoding; greedy and sampled requests are never in the same generate() call


@dataclass(frozen=True)
class Completion:
    """The result of a Request: the prompt ids (with all image tokens of each picture), the sampled ids, and the logprob
    (in nats) of each sampled id."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    unusable: str = ""  # why a picture of the prompt could not be read; the response is then empty
