"""Reads data files, checks every row and converts the rows to Prompts. No model and no tokenizer is needed.

A row is `{"id", "task", "messages", "ground_truth" or "reference", "meta", "images"}`. PaCoRe rows also have
`{"messages_pool", "pool_accuracy", "pool_accepted"}`. All rows are checked before a run starts any other work, and all
problems are reported together.
"""

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from rl.config import Source
from rl.record.metrics import task_name_problem
from rl.types import Picture, Prompt, Resize, Rollout
from rollout.data.adapters import Adapter, get_adapter
from rollout.data.chat_format import Message, check_text, open_picture, parse_chat, sampled_picture
from rollout.data.data_files import RawRow, raw_rows
from rollout.data.errors import BadRow, InvalidRow, RowError, describe
from rollout.data.pictures import decode_all

COLUMNS = (
    "id", "task", "messages", "images", "ground_truth", "reference", "meta", "messages_pool", "pool_accuracy",
    "pool_accepted",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """The rows of one or more sources, in file order. `prompts` has the usable rows, and `bad` has all other rows."""

    prompts: tuple[Prompt, ...]
    sources: tuple[int, ...]  # for each prompt, the index of its source
    bad: tuple[BadRow, ...]
    conversions: Mapping[str, int] = field(default_factory=dict)  # how many pictures are converted, and how

    def checked(self, on_bad_row: Literal["stop", "skip"] = "stop") -> Self:
        """Returns this object. Raises RowError in two cases: all rows are bad, or there are bad rows and `on_bad_row`
        is "stop"."""
        if self.bad and (on_bad_row == "stop" or not self.prompts):
            raise RowError(self.bad)
        return self


@dataclass
class _Reader:
    """The state of one call of `read`: the call's options, the current source, and the ids and pictures read so far."""

    reserved: Sequence[str]
    tasks: Collection[str] | None
    unique: bool = True
    picture_folders: Sequence[Path] = ()
    shown: Resize | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # belongs to the current source, like the next 3 fields
    adapter: Adapter | None = None
    task: str | None = None  # the task that rows without a task get
    upright: bool = True  # True: pictures are turned as their EXIF data say
    name: str = ""  # rows without an id get an id that begins with this name
    seen: dict[str, str] = field(default_factory=dict)  # id -> FILE:LINE of the first row with this id
    pictures: dict[tuple[Path, bool], Picture] = field(
        default_factory=dict
    )  # a picture used by many rows is hashed only once


def read(
    sources: Sequence[Source],
    *,
    columns: Mapping[str, str] | None = None,
    reserved: Sequence[str] = (),
    tasks: Collection[str] | None = None,
    problem: Callable[[Prompt], str | None] = lambda prompt: None,
    problems: Callable[[Sequence[Prompt]], Sequence[str | None]] = lambda prompts: [None] * len(prompts),
    unique: bool = True,
    picture_folders: Iterable[str | Path] = (),
    shown: Resize | None = None,
    check_pictures: int | None = None,
) -> Rows:
    """Reads all rows of the sources, in file order. Each row becomes a Prompt or a BadRow.

    Decodes every picture that was not decoded before (see pictures.py), or a sample of the pictures.

    Args:
        columns: {our column name: column name in the data}, for sources without an adapter. A dotted name selects a
            value inside a column. If `columns` are given without `id`, a row without an id gets an id made of file name
            and line.
        reserved: control tokens of the model (`<im_patch>`, ...). A row is bad if its text contains a control token,
            because the tokenizer would not treat this token as text.
        tasks: the tasks that have a reward. None means that any task is accepted.
        problem: an additional check, which returns the reason why a prompt cannot be used, or None.
        problems: another check, for all prompts together that have passed the other checks.
        unique: if True, every row needs an id that no other row has.
        picture_folders: folders in which pictures may be, in addition to the folder of the data.
        shown: computes the size in which the model is shown a picture. Needed for rewards with `coordinates: shown`.
        check_pictures: number of pictures that are decoded. None means all pictures.
    Returns:
        The rows. The `messages` of a prompt contain text and one placeholder `{"type": "image"}` for each picture. The
        pictures are not in the placeholders, but in `images`, in the same order. Content without a picture is always
        one str, because text-only chat templates need a str.
    Raises: ValueError if a source does not exist, has an unknown type, cannot be read at all, or has no rows.
    """
    reader = _Reader(tuple(reserved), tasks, unique, [Path(folder) for folder in picture_folders], shown)
    found: list[tuple[int, RawRow, Prompt | str]] = []  # index of the source, row, and the prompt or a problem
    for number, source in enumerate(sources):
        if source.adapter and source.columns:
            raise ValueError(
                f"{source.path}: a source with an adapter must not have columns; leave out adapter or columns"
            )
        reader.adapter = get_adapter(source.adapter) if source.adapter else None
        reader.columns = {} if source.adapter else _checked_columns({**(columns or {}), **source.columns})
        reader.task, reader.upright = source.task, not source.as_stored
        base = Path(source.path).name
        same_name = sum(Path(other.path).name == base for other in sources[:number])
        reader.name = f"{base}#{same_name + 1}" if same_name else base
        rows_before = len(found)
        for raw in islice(raw_rows(source.path, streaming=source.streaming), source.limit):
            place = replace(raw, values=None)  # the values of all rows together may need much memory
            try:
                prompt = _read_prompt(raw, reader)
                found.append((number, place, problem(prompt) or prompt))
            except InvalidRow as invalid:
                found.append((number, place, str(invalid)))
        if len(found) == rows_before:
            raise ValueError(f"{source.path} has no rows")
    return _usable(found, problems, check_pictures)


def _usable(
    found: Sequence[tuple[int, RawRow, Prompt | str]],
    problems: Callable[[Sequence[Prompt]], Sequence[str | None]],
    check_pictures: int | None,
) -> Rows:
    """Returns the rows of `found`. Rows whose pictures cannot be decoded, and rows with one of `problems`, become bad
    rows."""
    prompts = [prompt for _, _, prompt in found if isinstance(prompt, Prompt)]
    pictures = decode_all((picture for prompt in prompts for picture in prompt.images), check_pictures)
    damaged = [
        next((pictures.damaged[p.digest] for p in one.images if p.digest in pictures.damaged), None) for one in prompts
    ]
    sound = [prompt for prompt, why in zip(prompts, damaged, strict=True) if why is None]
    asked = iter(problems(sound))
    reasons = iter([why if why is not None else next(asked) for why in damaged])
    good: list[tuple[Prompt, int]] = []
    bad: list[BadRow] = []
    for number, raw, prompt in found:
        reason = next(reasons) if isinstance(prompt, Prompt) else prompt
        if reason is not None:
            bad.append(BadRow(raw.file, raw.line, reason))
        elif isinstance(prompt, Prompt):
            good.append((prompt, number))
    return Rows(
        tuple(prompt for prompt, _ in good), tuple(number for _, number in good), tuple(bad), pictures.conversions
    )


@dataclass(frozen=True)
class Sample:
    """A response and the row of the file that it comes from, with all of its columns."""

    rollout: Rollout
    row: Mapping[str, Any]
    place: str  # FILE:LINE


def read_samples(
    source: str | Path, picture_folders: Iterable[str | Path] = (), shown: Resize | None = None
) -> list[Sample]:
    """Reads samples, which are rows with a response, in file order. For example, a run's rollouts/ files contain
    samples.

    A sample has the column `response` and may have `finish` ("stop" or "length"). All other columns are optional. A
    sample without an id gets an id made of its line number. Several samples may have the same id.

    Args:
        picture_folders: folders in which pictures may be, in addition to the folder of the file.
        shown: computes the size in which the model is shown a picture.
    Raises: a RowError that lists the samples that cannot be used; ValueError for the same reasons as `read`.
    """
    reader = _Reader((), None, picture_folders=[Path(folder) for folder in picture_folders], shown=shown)
    samples: list[Sample] = []
    bad: list[BadRow] = []
    for raw in raw_rows(str(source)):
        try:
            samples.append(Sample(_read_sample(raw, reader), raw.values or {}, f"{raw.file}:{raw.line}"))
        except InvalidRow as invalid:
            bad.append(BadRow(raw.file, raw.line, str(invalid)))
    if bad:
        raise RowError(bad)
    if not samples:
        raise ValueError(f"{source} has no samples")
    return samples


def _checked_columns(columns: Mapping[str, str]) -> Mapping[str, str]:
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ValueError(f"data.columns: {unknown[0]!r} is not a column of rows; columns are {', '.join(COLUMNS)}")
    return columns


# One row


def _read_prompt(raw: RawRow, reader: _Reader) -> Prompt:
    if raw.values is None:
        raise InvalidRow(raw.problem)
    row = _our_columns(raw.values, raw, reader)
    for name, value in row.items():
        check_text(name, value)
    row_id = _row_id(row)
    if row_id in reader.seen and reader.unique:
        raise InvalidRow(f"id {row_id!r} was used before, at {reader.seen[row_id]}")
    reader.seen[row_id] = f"{raw.file}:{raw.line}"
    _check_reference(row)
    _task(row, reader.tasks)
    messages, sources = parse_chat(row, reader.reserved)
    return _make_prompt(row, reader, messages, [_open_picture(source, raw, reader) for source in sources])


def _read_sample(raw: RawRow, reader: _Reader) -> Rollout:
    if raw.values is None:
        raise InvalidRow(raw.problem)
    text, finish = raw.values.get("response"), raw.values.get("finish") or "stop"
    if not isinstance(text, str):
        raise InvalidRow(f"response must be a text, but is {describe(text)}")
    if finish not in ("stop", "length"):
        raise InvalidRow(f"finish must be stop or length, but is {describe(finish)}")
    row = {name: raw.values[name] for name in COLUMNS if raw.values.get(name) is not None}
    row = {"id": f"line {raw.line}", "task": "sample", **row}
    messages, sources = parse_chat(row, reader.reserved) if "messages" in row else ([], [])
    pictures = [sampled_picture(source) or _open_picture(source, raw, reader) for source in sources]
    return Rollout(_make_prompt(row, reader, messages, pictures), text, finish)


def _open_picture(source: Any, raw: RawRow, reader: _Reader) -> Picture:
    own = raw.folders if raw.base is None else (raw.base, *raw.folders)
    return open_picture(
        source, raw.base, (*own, *reader.picture_folders), reader.pictures, reader.upright, reader.shown
    )


def _make_prompt(
    row: Mapping[str, Any], reader: _Reader, messages: Sequence[Message], pictures: Sequence[Picture]
) -> Prompt:
    row_id, task = _row_id(row), _task(row, reader.tasks)
    _check_json("ground_truth", row.get("ground_truth"))
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise InvalidRow(f"meta must be an object, but is {describe(meta)}")
    _check_json("meta", meta)
    return Prompt(
        id=row_id,
        task=task,
        messages=tuple(messages),
        images=tuple(pictures),
        ground_truth=row.get("ground_truth"),
        reference=row.get("reference"),
        meta=meta,
        messages_pool=_messages_pool(row, reader.reserved),
        pool_accuracy=_pool_accuracy(row),
        pool_accepted=_pool_accepted(row),
    )


def _our_columns(values: Mapping[str, Any], raw: RawRow, reader: _Reader) -> dict[str, Any]:
    """Returns the row with its columns renamed to the names in COLUMNS."""
    if reader.adapter:
        try:
            row = {name: value for name, value in reader.adapter(values).items() if value is not None}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
            reason = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise InvalidRow(f"does not fit the adapter {reader.adapter.__name__}: {reason}") from problem
    else:
        row = _rename_columns(values, reader.columns)
        if "messages" not in row and values.get("conversations") is not None:  # ShareGPT's name of the column
            row["messages"] = values["conversations"]
    foreign = reader.adapter or (reader.columns and "id" not in reader.columns)
    if "id" not in row and (foreign or not reader.unique):
        row["id"] = f"{reader.name}:{raw.line}"
    if reader.task:
        row.setdefault("task", reader.task)
    return row


_ABSENT = object()


def _look_up(values: Any, name: str) -> Any:
    """Returns the value of a dotted name such as "a.b". If there is a key "a.b", the result is the value of this
    key. Otherwise the parts of the name are looked up in nested mappings and lists. Returns _ABSENT if there is no such
    value."""
    if isinstance(values, Mapping) and name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    if isinstance(values, list) and first.isdigit() and int(first) < len(values):
        inner = values[int(first)]
    elif isinstance(values, Mapping) and dot and first in values:
        inner = values[first]
    else:
        return _ABSENT
    return _look_up(inner, rest) if dot else inner


def _rename_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the row with its columns renamed to the names in COLUMNS. Nulls are removed, because Arrow fills absent
    fields with nulls."""
    renamed = {ours: _look_up(values, theirs) for ours, theirs in columns.items()}
    absent = [columns[ours] for ours, value in renamed.items() if value is _ABSENT]
    if absent:
        raise InvalidRow(f"data.columns refers to {absent[0]!r}, but the row only has the columns {', '.join(values)}")
    renamed |= {ours: values.get(ours) for ours in COLUMNS if ours not in columns}
    row = {ours: value for ours, value in renamed.items() if value is not None}
    read = {ours for ours in COLUMNS if ours not in columns} | {theirs.partition(".")[0] for theirs in columns.values()}
    for name in [n for n, value in values.items() if n not in read | set(columns.values()) and value is not None]:
        near = difflib.get_close_matches(name, set(COLUMNS) - set(row), n=1, cutoff=0.85)
        if near:  # for example, a run that ignored a column `image` would use no pictures
            raise InvalidRow(f"column {name!r} is not read; did you mean {near[0]!r}? (data.columns can rename it)")
    return row


def _row_id(row: Mapping[str, Any]) -> str:
    row_id = row.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise InvalidRow(f"id must be a text or an integer, but is {describe(row_id)}")
    return str(row_id)


def _task(row: Mapping[str, Any], tasks: Collection[str] | None) -> str:
    task = row.get("task")
    if not isinstance(task, str) or not task:
        raise InvalidRow(f"task must be a text, but is {describe(task)}")
    if problem := task_name_problem(task):
        raise InvalidRow(problem)
    if tasks is not None and task not in tasks:
        raise InvalidRow(f"task {task!r} has no reward; rewards exist for {', '.join(sorted(tasks)) or 'none'}")
    return task


def _check_reference(row: Mapping[str, Any]) -> None:
    if not isinstance(row.get("reference", ""), str):
        raise InvalidRow(f"reference must be a text, but is {describe(row['reference'])}")


def _messages_pool(row: Mapping[str, Any], reserved: Sequence[str]) -> tuple[str, ...]:
    pool = row.get("messages_pool", [])
    if not isinstance(pool, list) or not all(isinstance(message, str) and message.strip() for message in pool):
        raise InvalidRow(f"messages_pool must be a list of texts that are not empty, but is {describe(pool)}")
    if found := [word for word in reserved if any(word in message for message in pool)]:
        raise InvalidRow(f"messages_pool contains {found[0]!r}, a control token of the model; leave such messages out")
    return tuple(pool)


def _pool_accepted(row: Mapping[str, Any]) -> tuple[bool, ...]:
    accepted, pool = row.get("pool_accepted", []), row.get("messages_pool", [])
    if not isinstance(accepted, list) or not all(isinstance(value, bool) for value in accepted):
        raise InvalidRow(f"pool_accepted must be a list of true and false, but is {describe(accepted)}")
    if accepted and len(accepted) != len(pool):
        raise InvalidRow(f"pool_accepted has {len(accepted)} entries, but messages_pool has {len(pool)}")
    return tuple(accepted)


def _pool_accuracy(row: Mapping[str, Any]) -> float | None:
    share = row.get("pool_accuracy")
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise InvalidRow(f"pool_accuracy must be between 0 and 1, but is {describe(share)}")
    return float(share)


def _check_json(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise InvalidRow(f"{name} cannot be written as JSON: {problem}") from problem
