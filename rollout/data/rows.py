"""Data files to Prompts: reads, checks and orders the rows of a run. Knows nothing of tokens or models.

A row is `{"id", "task", "messages", "ground_truth" or "reference", "meta", "images"}`; PaCoRe rows add
`{"messages_pool", "pool_accuracy", "pool_accepted"}`. Everything that can be wrong with a row is found here, for all
rows at once and before anything is started; pictures are opened only as far as their header and decoded by whoever
needs the pixels.
"""

import base64
import binascii
import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from rl.config import Source
from rl.record.metrics import task_name_problem
from rl.types import Picture, Prompt, Rollout
from rollout.data.adapters import Adapter, adapter
from rollout.data.data_files import RawRow, raw_rows

MARK = "<image>"
COLUMNS = (
    "id", "task", "messages", "images", "ground_truth", "reference", "meta", "messages_pool", "pool_accuracy",
    "pool_accepted",
)  # fmt: skip
ROLES = ("system", "user", "assistant", "tool")
SHOWN = 20  # bad rows an error message spells out
BASE64_PICTURE = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin
SHORTEST_PICTURE = 64  # in base64; what begins alike and is shorter is a path


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: `line` counts from 1 (a line of a JSONL file, a row of anything else)."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class RowError(ValueError):
    """Some rows are bad. `bad` has all of them, the message the first 20 and the count."""

    def __init__(self, bad: Sequence[BadRow]) -> None:
        self.bad = tuple(bad)
        super().__init__("\n".join([f"{len(bad)} bad data row(s):", *listed(bad)]))


def listed(bad: Sequence[BadRow]) -> list[str]:
    """A line for each of the first of them, and one that counts the others."""
    more = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return [*(f"  {row}" for row in bad[:SHOWN]), *more]


@dataclass(frozen=True)
class Rows:
    """What some sources hold: the rows that can be used, and those that cannot."""

    prompts: tuple[Prompt, ...]
    sources: tuple[int, ...]  # of each prompt, numbered from 0 as they were given
    bad: tuple[BadRow, ...]


class _Bad(Exception):
    """Why the row at hand is bad; read_rows turns it into a BadRow."""


@dataclass
class _Checker:
    reserved: Sequence[str]
    tasks: Collection[str] | None
    unique: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)  # of the source at hand
    adapter: Adapter | None = None  # likewise
    task: str | None = None  # likewise
    name: str = ""  # of the source at hand, in the ids of its rows if they have none
    seen: dict[str, str] = field(default_factory=dict)  # id -> where it was first
    pictures: dict[Path, Picture] = field(default_factory=dict)  # a picture many rows show is hashed once


def read(
    sources: Sequence[Source],
    *,
    columns: Mapping[str, str] | None = None,
    reserved: Sequence[str] = (),
    tasks: Collection[str] | None = None,
    problem: Callable[[Prompt], str | None] = lambda prompt: None,
    unique: bool = True,
) -> Rows:
    """Every row of some sources, as a Prompt or as a bad one, in file order.

    Args:
        columns: {our name: the data's name} for sources without an adapter that call a column differently; a dotted
            name looks inside a column. Such rows need no id: they get one from their line.
        reserved: control texts of the model (`<im_patch>`, ...): a row that contains one literally is bad,
            because it would be tokenised as a control token.
        tasks: the tasks that have a reward; None accepts any.
        problem: what else is wrong with a row, None if nothing.
        unique: whether ids must be there and differ.
    Returns:
        Prompts whose `messages` hold text and bare `{"type": "image"}` placeholders, in the order of
        `images`. Content without a picture is always one str, as text-only chat templates want it.
    Raises: ValueError if a source is missing, of an unknown kind, unreadable as a whole, or has no rows.
    """
    checker = _Checker(tuple(reserved), tasks, unique)
    prompts: list[Prompt] = []
    owners: list[int] = []
    bad: list[BadRow] = []
    for number, source in enumerate(sources):
        if source.adapter and source.columns:
            raise ValueError(f"{source.path}: an adapter knows its columns; leave out one of adapter and columns")
        checker.adapter = adapter(source.adapter) if source.adapter else None
        checker.columns = {} if source.adapter else _checked_columns({**(columns or {}), **source.columns})
        checker.task = source.task
        base = Path(source.path).name
        before_it = sum(Path(other.path).name == base for other in sources[:number])
        checker.name = f"{base}#{before_it + 1}" if before_it else base
        before = len(prompts) + len(bad)
        for raw in islice(raw_rows(source.path, streaming=source.streaming), source.limit):
            try:
                prompt = _prompt(raw, checker)
                if (found := problem(prompt)) is not None:
                    raise _Bad(found)
            except _Bad as why:
                bad.append(BadRow(raw.file, raw.line, str(why)))
            else:
                prompts.append(prompt)
                owners.append(number)
        if len(prompts) + len(bad) == before:
            raise ValueError(f"{source.path} has no rows")
    return Rows(tuple(prompts), tuple(owners), tuple(bad))


def read_rows(source: str | Path | Sequence[str | Path], **options: Any) -> list[Prompt]:
    """As `read` for paths alone, where all rows must be good.

    Raises: RowError, which lists those that are not; ValueError as `read` does.
    """
    paths = [source] if isinstance(source, (str, Path)) else source
    rows = read([Source(path=str(path)) for path in paths], **options)
    if rows.bad:
        raise RowError(rows.bad)
    return list(rows.prompts)


def read_samples(source: str | Path) -> list[Rollout]:
    """Rows that come with a response, such as a run's rollouts/ files, in file order.

    A sample has the columns of a row and `response`, and may have `finish` ("stop" or "length"). The same id may
    come again; a sample without id is called by its line, one without task or messages has none to show.
    Raises RowError or ValueError as read_rows does.
    """
    checker = _Checker((), None)
    samples: list[Rollout] = []
    bad: list[BadRow] = []
    for raw in raw_rows(str(source)):
        try:
            samples.append(_sample(raw, checker))
        except _Bad as problem:
            bad.append(BadRow(raw.file, raw.line, str(problem)))
    if bad:
        raise RowError(bad)
    if not samples:
        raise ValueError(f"{source} has no samples")
    return samples


class Order(Protocol):
    """Which prompts an iteration gets."""

    def prompts_at(self, position: int, count: int) -> list[Prompt]: ...


class PromptOrder:
    """Which prompts an iteration gets: each pass over the data is shuffled anew, and no row is ever skipped.

    Its only state is a position that the caller keeps: how many prompts were handed out since the run began.
    Pass e is sorted by SHA-256 of (seed, e, id), so the order depends on neither Python's version nor the
    order of the rows on disk. A call that crosses the end of a pass may return the same prompt twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("no prompts to draw from")
        self._prompts, self._seed = list(prompts), seed
        self._passes: dict[int, list[Prompt]] = {}

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Prompts number `position` to `position + count - 1` of the endless sequence of passes."""
        places = (divmod(number, len(self._prompts)) for number in range(position, position + count))
        return [self._shuffled(epoch)[place] for epoch, place in places]

    def _shuffled(self, epoch: int) -> list[Prompt]:
        if epoch not in self._passes:
            self._passes = {e: order for e, order in self._passes.items() if e == epoch - 1}
            self._passes[epoch] = sorted(self._prompts, key=lambda prompt: self._key(epoch, prompt))
        return self._passes[epoch]

    def _key(self, epoch: int, prompt: Prompt) -> bytes:
        return hashlib.sha256(f"{self._seed}/{epoch}/{prompt.id}".encode()).digest()


class MixedOrder:
    """Several orders, of which each gives its share of the prompts.

    The prompt at position n comes from the order that is furthest behind its share of n + 1, so that every stretch of
    the run has all of them in proportion. The only state is the position, as in PromptOrder.

    Args:
        weights: of each order, over 0.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        self._orders, self._shares = list(orders), [weight / sum(weights) for weight in weights]
        self._given = [0] * len(orders)
        self._places: list[tuple[int, int]] = []  # (order, position in it) of each position so far

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """Prompts number `position` to `position + count - 1`."""
        while len(self._places) < position + count:
            so_far = len(self._places) + 1
            behind = [share * so_far - given for share, given in zip(self._shares, self._given, strict=True)]
            chosen = behind.index(max(behind))
            self._places.append((chosen, self._given[chosen]))
            self._given[chosen] += 1
        places = self._places[position : position + count]
        return [prompt for order, place in places for prompt in self._orders[order].prompts_at(place, 1)]


def _checked_columns(columns: Mapping[str, str]) -> Mapping[str, str]:
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ValueError(f"data.columns: {unknown[0]!r} is no column of ours; they are {', '.join(COLUMNS)}")
    return columns


# One row


def _prompt(raw: RawRow, checker: _Checker) -> Prompt:
    if raw.values is None:
        raise _Bad(raw.problem)
    row = _row(raw.values, raw, checker)
    identity = _identity(row)
    if identity in checker.seen and checker.unique:
        raise _Bad(f"id {identity!r} was used before, at {checker.seen[identity]}")
    checker.seen[identity] = f"{raw.file}:{raw.line}"
    _check_reference(row)
    _task(row, checker.tasks)
    return _made(row, raw, checker, _chat(row, checker.reserved))


def _sample(raw: RawRow, checker: _Checker) -> Rollout:
    if raw.values is None:
        raise _Bad(raw.problem)
    text, finish = raw.values.get("response"), raw.values.get("finish") or "stop"
    if not isinstance(text, str):
        raise _Bad(f"response must be a text, this is {_kind(text)}")
    if finish not in ("stop", "length"):
        raise _Bad(f"finish must be stop or length, this is {_kind(finish)}")
    row = {name: raw.values[name] for name in COLUMNS if raw.values.get(name) is not None}
    row = {"id": f"line {raw.line}", "task": "sample", **row}
    chat = _chat(row, checker.reserved) if "messages" in row else ([], [])
    return Rollout(_made(row, raw, checker, chat), text, finish)


Content = tuple[list[dict[str, Any]], list[Any]]  # messages, and the sources of their pictures


def _made(row: Mapping[str, Any], raw: RawRow, checker: _Checker, chat: Content) -> Prompt:
    identity, task = _identity(row), _task(row, checker.tasks)
    messages, sources = chat
    _check_json("ground_truth", row.get("ground_truth"))
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise _Bad(f"meta must be an object, this is {_kind(meta)}")
    _check_json("meta", meta)
    return Prompt(
        id=identity,
        task=task,
        messages=tuple(messages),
        images=tuple(_picture(one, raw.folder, checker.pictures) for one in sources),
        ground_truth=row.get("ground_truth"),
        reference=row.get("reference"),
        meta=meta,
        messages_pool=_pool(row, checker.reserved),
        pool_accuracy=_pool_accuracy(row),
        pool_accepted=_pool_accepted(row),
    )


def _row(values: Mapping[str, Any], raw: RawRow, checker: _Checker) -> dict[str, Any]:
    """The row under our column names, whatever its source calls them."""
    if checker.adapter:
        try:
            row = {name: value for name, value in checker.adapter(values).items() if value is not None}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
            why = f"has no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise _Bad(f"is no row of {checker.adapter.__name__}: {why}") from problem
    else:
        row = _named(values, checker.columns)
    foreign = checker.adapter or (checker.columns and "id" not in checker.columns)
    if "id" not in row and (foreign or not checker.unique):
        row["id"] = f"{checker.name}:{raw.line}"
    if checker.task:
        row.setdefault("task", checker.task)
    return row


_ABSENT = object()


def _inside(values: Any, name: str) -> Any:
    """values["a.b"], or what a dotted name leads to through mappings and lists."""
    if isinstance(values, Mapping) and name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    if isinstance(values, list) and first.isdigit() and int(first) < len(values):
        found = values[int(first)]
    elif isinstance(values, Mapping) and dot and first in values:
        found = values[first]
    else:
        return _ABSENT
    return _inside(found, rest) if dot else found


def _named(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names, without nulls (Arrow fills absent fields with them)."""
    given = {ours: _inside(values, theirs) for ours, theirs in columns.items()}
    absent = [columns[ours] for ours, value in given.items() if value is _ABSENT]
    if absent:
        raise _Bad(f"no column {absent[0]!r}, which data.columns names; there are {', '.join(values)}")
    given |= {ours: values.get(ours) for ours in COLUMNS if ours not in columns}
    row = {ours: value for ours, value in given.items() if value is not None}
    read = {ours for ours in COLUMNS if ours not in columns} | {theirs.partition(".")[0] for theirs in columns.values()}
    for name in [n for n, value in values.items() if n not in read | set(columns.values()) and value is not None]:
        near = difflib.get_close_matches(name, set(COLUMNS) - set(row), n=1, cutoff=0.85)
        if near:  # an `image` that we ignore would train on text alone without a word
            raise _Bad(f"column {name!r} is not read; did you mean {near[0]!r}? (data.columns can rename it)")
    return row


def _identity(row: Mapping[str, Any]) -> str:
    identity = row.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise _Bad(f"id must be a text or an integer, this is {_kind(identity)}")
    return str(identity)


def _task(row: Mapping[str, Any], tasks: Collection[str] | None) -> str:
    task = row.get("task")
    if not isinstance(task, str) or not task:
        raise _Bad(f"task must be a text, this is {_kind(task)}")
    if problem := task_name_problem(task):
        raise _Bad(problem)
    if tasks is not None and task not in tasks:
        raise _Bad(f"task {task!r} has no reward; the recipe has {', '.join(sorted(tasks)) or 'none'}")
    return task


def _check_reference(row: Mapping[str, Any]) -> None:
    if not isinstance(row.get("reference", ""), str):
        raise _Bad(f"reference must be a text, this is {_kind(row['reference'])}")


def _pool(row: Mapping[str, Any], reserved: Sequence[str]) -> tuple[str, ...]:
    pool = row.get("messages_pool", [])
    if not isinstance(pool, list) or not all(isinstance(one, str) and one.strip() for one in pool):
        raise _Bad(f"messages_pool must be a list of texts that are not empty, this is {_kind(pool)}")
    if found := [word for word in reserved if any(word in one for one in pool)]:
        raise _Bad(f"messages_pool holds {found[0]!r}, control text of the model; leave such messages out")
    return tuple(pool)


def _pool_accepted(row: Mapping[str, Any]) -> tuple[bool, ...]:
    accepted, pool = row.get("pool_accepted", []), row.get("messages_pool", [])
    if not isinstance(accepted, list) or not all(isinstance(one, bool) for one in accepted):
        raise _Bad(f"pool_accepted must be a list of true and false, this is {_kind(accepted)}")
    if accepted and len(accepted) != len(pool):
        raise _Bad(f"pool_accepted is about {len(accepted)} messages, but messages_pool has {len(pool)}")
    return tuple(accepted)


def _pool_accuracy(row: Mapping[str, Any]) -> float | None:
    share = row.get("pool_accuracy")
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise _Bad(f"pool_accuracy must be between 0 and 1, this is {_kind(share)}")
    return float(share)


def _check_json(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise _Bad(f"{name} holds what JSON cannot: {problem}") from problem


# The chat and its pictures


def _chat(row: Mapping[str, Any], reserved: Sequence[str]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with bare placeholders, and the pictures they stand for, in order."""
    column = row.get("images", [])
    if isinstance(column, (str, bytes, dict)):
        column = [column]
    if not isinstance(column, list):
        raise _Bad(f"images must be a list, this is {_kind(column)}")
    messages = row.get("messages")
    if isinstance(messages, str) and messages.strip():  # a plain question, whose pictures come first if unmarked
        marks = MARK * len(column) if MARK not in messages else ""
        messages = [{"role": "user", "content": marks + messages}]
    if not isinstance(messages, list) or not messages:
        raise _Bad(f"messages must be a question or a list of {{role, content}}, this is {_kind(messages)}")
    parts = [_parts(number, message) for number, message in enumerate(messages)]
    flat = [part for message in parts for part in message]
    sources = _sources(flat, column)
    for text in (part["text"] for part in flat if part["type"] == "text"):
        if found := [word for word in reserved if word in text]:
            raise _Bad(f"the text holds {found[0]!r}, control text of the model; write it differently")
    if messages[-1]["role"] not in ("user", "tool"):
        raise _Bad(f"the last message is from {messages[-1]['role']!r}; a prompt ends with what is to be answered")
    chat = [_message(m["role"], content) for m, content in zip(messages, parts, strict=True)]
    return chat, sources


def _message(role: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    if all(part["type"] == "text" for part in parts):
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": [{"type": "image"} if p["type"] == "image" else p for p in parts]}


def _sources(parts: list[dict[str, Any]], column: list[Any]) -> list[Any]:
    """What each placeholder shows: its own `image`, or the next of the column `images`."""
    places = [part for part in parts if part["type"] == "image"]
    own = [part["image"] for part in places if "image" in part]
    if own and column:
        raise _Bad("pictures stand both in messages and in the column images; use one of the two")
    open_places = len(places) - len(own)
    if open_places != len(column):
        raise _Bad(f"{open_places} {MARK} mark(s) in messages for {len(column)} picture(s) in images")
    return own or list(column)


def _parts(number: int, message: Any) -> list[dict[str, Any]]:
    """One message's content as text and image parts; each mark in a text becomes an image part."""
    if not isinstance(message, dict):
        raise _Bad(f"message {number} must be {{role, content}}, this is {_kind(message)}")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise _Bad(f"message {number} has the key {extra[0]!r}; only role and content are understood")
    if message.get("role") not in ROLES:
        raise _Bad(f"message {number} has the role {message.get('role')!r}; there are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _Bad(f"message {number}: content must be a text or a list of parts, this is {_kind(content)}")
    parts = [piece for part in content for piece in _pieces(number, part)]
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise _Bad(f"message {number} is empty")
    return parts


def _pieces(number: int, part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        raise _Bad(f"message {number}: a part must be an object with a type, this is {_kind(part)}")
    given = {key: value for key, value in part.items() if value is not None}
    match given:
        case {"type": "image", **rest} if rest.keys() <= {"image"}:
            return [given]
        case {"type": "image", "digest": str(digest), **rest} if not rest:  # in samples: a picture that came as bytes
            return [{"type": "image", "image": {"digest": digest}}]
        case {"type": "text", "text": str(text), **rest} if not rest:
            return _split_at_marks(text)
    raise _Bad(f"message {number}: {_shown(given)} is neither {{type: text, text}} nor {{type: image, image}}")


def _split_at_marks(text: str) -> list[dict[str, Any]]:
    first, *others = text.split(MARK)
    pieces: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for other in others:
        pieces += [{"type": "image"}, {"type": "text", "text": other}]
    return [piece for piece in pieces if piece.get("text") != ""]


def _picture(source: Any, folder: Path, known: dict[Path, Picture]) -> Picture:
    """`source` is a path, encoded bytes, their base64 (alone or in a data: URL), the {bytes, path} of a Hugging Face
    Image column, or the {digest} of a sample whose picture is only known by name."""
    if isinstance(source, dict) and (digest := source.get("digest")):
        return Picture(b"", digest)
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return _opened(Picture.of(source), "the picture's bytes")
    if not isinstance(source, str) or not source:
        raise _Bad(f"a picture must be a path or bytes, this is {_kind(source)}")
    if source.startswith("data:") or (source.startswith(BASE64_PICTURE) and len(source) >= SHORTEST_PICTURE):
        return _opened(Picture.of(_decoded(source)), "the picture in base64")
    if "://" in source:
        raise _Bad(f"picture {source[:80]!r} is a URL; save it and give its path")
    path = (folder / source).resolve()
    if path not in known:
        if not path.is_file():
            raise _Bad(f"picture {path} does not exist (paths are relative to the data file)")
        known[path] = _opened(Picture.of(path), str(path))
    return known[path]


def _decoded(source: str) -> bytes:
    head, comma, data = source.partition(",")
    if comma and not head.endswith(";base64"):
        raise _Bad(f"picture {source[:40]!r} is a data URL without base64")
    try:
        return base64.b64decode(data if comma else source, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise _Bad(f"picture {source[:40]!r} is no base64: {problem}") from problem


def _opened(picture: Picture, name: str) -> Picture:
    try:
        width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise _Bad(f"{name} does not open as a picture: {problem}") from problem
    if width < 1 or height < 1:
        raise _Bad(f"{name} is {width} x {height} pixels")
    return picture


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {_shown(value)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
