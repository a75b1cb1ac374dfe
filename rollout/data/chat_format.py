"""Checks the messages and pictures of a data row. Rows may use different notations, which are converted to one format.

Only the header of a picture is checked here. rows.py checks whether the pixels can be decoded.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rl.types import BadPicture, Picture, Resize
from rollout.data.errors import InvalidRow, describe, shorten

MARK = "<image>"
ROLES = ("system", "user", "assistant", "tool")
BASE64_PICTURE = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AKg")
"""The first characters of pictures in base64: PNG, JPEG, GIF, WebP, BMP, and both kinds of TIFF."""
LONGEST_PATH = 4096  # maximum number of characters of a path on Linux
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
DIGEST = re.compile("[0-9a-f]{64}")
SHORTEST_PICTURE = 64  # minimum length of a picture in base64; every shorter text is a path

Message = dict[str, Any]  # {role, content}; content is a str, or a list of text parts and {"type": "image"}
Part = dict[str, Any]  # one part of a message's content


def parse_chat(row: Mapping[str, Any], reserved: Sequence[str]) -> tuple[list[Message], list[Any]]:
    """Returns two lists: the messages of a row, with `{"type": "image"}` placeholders for its pictures, and the picture
    source of each placeholder, in order.

    Args:
        reserved: texts that the messages must not contain.
    Raises: InvalidRow.
    """
    column = row.get("images", [])
    if isinstance(column, (str, bytes, dict)):
        column = [column]
    if not isinstance(column, list):
        raise InvalidRow(f"images must be a list, but is {describe(column)}")
    messages = _as_turns(row.get("messages"))
    if isinstance(messages, str) and messages.strip():  # a question; if it has no marks, its pictures come first
        marks = MARK * len(column) if MARK not in messages else ""
        messages = [{"role": "user", "content": marks + messages}]
    if not isinstance(messages, list) or not messages:
        raise InvalidRow(f"messages must be a question or a list of {{role, content}}, but is {describe(messages)}")
    contents = [_content_parts(number, message) for number, message in enumerate(messages)]
    parts = [part for content in contents for part in content]
    sources = _picture_sources(parts, column)
    for text in (part["text"] for part in parts if part["type"] == "text"):
        if found := [word for word in reserved if word in text]:
            raise InvalidRow(f"the text contains {found[0]!r}, a control token of the model; write it differently")
    if messages[-1]["role"] not in ("user", "tool"):
        raise InvalidRow(f"the last message is from {messages[-1]['role']!r}; it must be from user or tool")
    return [_message(m["role"], content) for m, content in zip(messages, contents, strict=True)], sources


def _as_turns(messages: Any) -> Any:
    """Converts a chat that is stored as JSON text to a list, and ShareGPT's turns {from, value} to {role, content}.
    Other values stay unchanged. The last answer of a ShareGPT chat is left out, because the policy has to write it."""
    if isinstance(messages, str) and messages.lstrip().startswith("[") and messages.rstrip().endswith("]"):
        try:
            parsed = json.loads(messages)
        except (ValueError, RecursionError):
            return messages
        is_chat = (
            isinstance(parsed, list)
            and parsed
            and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in parsed)
        )
        messages = parsed if is_chat else messages
    if not isinstance(messages, list) or not messages:
        return messages
    if not all(isinstance(one, dict) and one.keys() >= {"from", "value"} and "role" not in one for one in messages):
        return messages
    turns = []
    for number, one in enumerate(messages):
        if one["from"] not in SHAREGPT_ROLES:
            raise InvalidRow(
                f"message {number} is from {one['from']!r}; ShareGPT's names are {', '.join(SHAREGPT_ROLES)}"
            )
        turns.append({"role": SHAREGPT_ROLES[one["from"]], "content": one["value"]})
    return turns[:-1] if turns[-1]["role"] == "assistant" and len(turns) > 1 else turns


def check_text(name: str, value: Any) -> None:
    """Raises InvalidRow if a text in a column contains half of a surrogate pair, which is no character and cannot be
    written to a file."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            raise InvalidRow(
                f"{name} contains {value[problem.start : problem.start + 1]!a} at position {problem.start}, half of a "
                "character (a lone surrogate); remove it"
            ) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_text(name, key)
            check_text(name, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_text(name, inner)


def open_picture(
    source: Any,
    base: Path | None,
    folders: Sequence[Path],
    known: dict[tuple[Path, bool], Picture],
    upright: bool = True,
    shown: Resize | None = None,
) -> Picture:
    """Opens the picture of a source and checks the picture's header.

    Args:
        source: a path, encoded bytes, base64 (alone or in a data: URL), or the {bytes, path} of a Hugging Face Image
            column. In {as_stored: source}, the picture is not turned.
        base: the folder that relative paths start from. None: relative paths are refused.
        folders: the folders in which pictures may be. Links are followed before a path is compared.
        known: (path, upright) -> picture, for pictures that were opened before. If this function opens a path, it
            adds the picture to `known`.
        upright: False if the picture must not be turned as its EXIF data say.
        shown: computes the size in which the model is shown a picture.
    Raises: InvalidRow.
    """
    if isinstance(source, dict) and "as_stored" in source:
        source, upright = source["as_stored"], False
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return _opened(source, "the picture's bytes", upright, shown)
    if not isinstance(source, str) or not source:
        raise InvalidRow(f"a picture must be a path or bytes, but is {describe(source)}")
    if source.startswith("data:") or (source.startswith(BASE64_PICTURE) and len(source) >= SHORTEST_PICTURE):
        return _opened(_decode_base64(source), "the picture in base64", upright, shown)
    if source.startswith("file://"):
        source = _path_of_url(source)
    if "://" in source:
        raise InvalidRow(f"picture {source[:80]!r} is a URL; save the picture and give the path of its file")
    if base is None and not Path(source).is_absolute():
        raise InvalidRow(f"picture {shorten(source)} is a path, but rows from the hub must contain their pictures")
    path = _resolved((base or Path()) / source)
    if not any(path.is_relative_to(_resolved(folder)) for folder in folders):
        raise InvalidRow(
            f"picture {path} is outside of the data's folder; if the row may use it, add its folder to "
            "data.picture_folders (or --picture-folder)"
        )
    if len(source) > LONGEST_PATH:
        raise InvalidRow(f"picture {shorten(source)} is a text of {len(source)} characters, and no path or base64")
    if (path, upright) not in known:
        if not os.path.isfile(path):  # Path.is_file() raises an error if the name is too long
            raise InvalidRow(f"picture {path} does not exist (paths are relative to the data file)")
        known[path, upright] = _opened(path, str(path), upright, shown)
    return known[path, upright]


def sampled_picture(source: Any) -> Picture | None:
    """Returns the picture of a sample, which stores only the digest of a picture, or None if `source` has no digest.
    The returned picture has no pixels. Raises InvalidRow if the digest is no SHA-256."""
    if not isinstance(source, dict) or "digest" not in source:
        return None
    if not DIGEST.fullmatch(str(source["digest"])):
        raise InvalidRow(f"the digest of a picture must be 64 hexadecimal digits, but is {describe(source['digest'])}")
    return Picture(b"", source["digest"])


def _message(role: str, parts: list[Part]) -> Message:
    if all(part["type"] == "text" for part in parts):
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": [{"type": "image"} if p["type"] == "image" else p for p in parts]}


def _picture_sources(parts: list[Part], column: list[Any]) -> list[Any]:
    """Returns the picture source of each placeholder: the placeholder's own `image`, or the next entry of the column
    `images`."""
    places = [part for part in parts if part["type"] == "image"]
    own = [part["image"] for part in places if "image" in part]
    if own and column:
        raise InvalidRow("pictures are both in messages and in the column images; use one of the two")
    open_places = len(places) - len(own)
    if open_places != len(column):
        raise InvalidRow(f"messages has {open_places} mark(s) {MARK}, but images has {len(column)} picture(s)")
    return own or list(column)


def _content_parts(number: int, message: Any) -> list[Part]:
    """Returns the content of a message as text parts and image parts. Each mark `<image>` in a text becomes an image
    part. The error messages contain `number`, the number of the message in its row."""
    if not isinstance(message, dict):
        raise InvalidRow(f"message {number} must be {{role, content}}, but is {describe(message)}")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise InvalidRow(f"message {number} has the key {extra[0]!r}; only role and content are supported")
    if message.get("role") not in ROLES:
        raise InvalidRow(f"message {number} has the role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidRow(f"message {number}: content must be a text or a list of parts, but is {describe(content)}")
    parts = [parsed for part in content for parsed in _parse_part(number, part)]
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise InvalidRow(f"message {number} is empty")
    return parts


def _parse_part(number: int, part: Any) -> list[Part]:
    if not isinstance(part, dict):
        raise InvalidRow(f"message {number}: a part must be an object with a type, but is {describe(part)}")
    keys = {key: value for key, value in part.items() if value is not None}
    match keys:
        case {"type": "image", **rest} if rest.keys() <= {"image"}:
            return [keys]
        case {"type": "image", "image": source, "as_stored": bool(as_stored), **rest} if not rest:
            return [{"type": "image", "image": {"as_stored": source} if as_stored else source}]
        case {"type": "image_url" | "input_image", "image_url": str(url), **rest} if rest.keys() <= {"detail"}:
            return [{"type": "image", "image": url}]
        case {"type": "image_url", "image_url": {"url": str(url)}, **rest} if not rest:  # as in OpenAI's chats
            return [{"type": "image", "image": url}]
        case {"type": "image", "digest": str(digest), **rest} if not rest:  # samples store a digest instead of bytes
            return [{"type": "image", "image": {"digest": digest}}]
        case {"type": "text" | "input_text", "text": str(text), **rest} if not rest:
            return _split_at_marks(text)
    raise InvalidRow(
        f"message {number}: the part {shorten(keys)} must be {{type: text, text}} or {{type: image, image}}"
    )


def _split_at_marks(text: str) -> list[Part]:
    first, *others = text.split(MARK)
    parts: list[Part] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def _decode_base64(source: str) -> bytes:
    head, comma, data = source.partition(",")
    if comma and not head.endswith(";base64"):
        raise InvalidRow(f"picture {source[:40]!r} is a data URL without base64")
    try:
        return base64.b64decode(data if comma else source, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise InvalidRow(f"picture {source[:40]!r} is not base64: {problem}") from problem


def _path_of_url(url: str) -> str:
    """Returns the path in a `file://` URL."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise InvalidRow(f"picture {shorten(url)} is a file on the machine {parts.netloc!r}, which cannot be read")
    return unquote(parts.path)


def _opened(source: Path | bytes, name: str, upright: bool, shown: Resize | None) -> Picture:
    try:
        return Picture.of(source, upright, shown)
    except (BadPicture, OSError) as problem:
        raise InvalidRow(f"{name} cannot be opened as a picture: {problem}") from problem


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # for example, links in a circle, or a null byte
        raise InvalidRow(f"picture {shorten(str(path))} has no valid path: {problem}") from problem
