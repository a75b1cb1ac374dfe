"""The folder that a curation writes: what it was begun with, and every block's rows and fates.

What is there is whole: files appear with all of their content, and a block's rows last of all.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.exits import InputError
from rl.recipe.resolve import differences, load
from rl.record.disk import hold, replacing, writing
from rl.record.run_folder import image_part, messages_of
from rl.types import Picture, Prompt
from stages.curation.filters import Fate, Row

RECIPE, STATE = "recipe.yaml", "state.json"
MATTER = (
    "model",
    "data",
    "rewards",
    "curate",
    "accept",
    "synthesis",
    "seed",
    "max_sequence_length",
    "rollout.temperature",
)
Decision = tuple[str, Fate]  # with the filter that dropped the row, or ""


@dataclass(frozen=True)
class Out:
    """The folder that is written."""

    path: Path

    @contextmanager
    def begun(self, config: Config, recipe: str, digest: str) -> Iterator[None]:
        """Keep the folder for this process, new or with the same work begun in it.

        Raises: InputError if it holds something else, or if somebody else is writing there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give a folder as --out")
        names = {entry.name.removesuffix(".partial") for entry in self.path.iterdir()} if self.path.exists() else set()
        if names and RECIPE not in names:
            raise InputError(f"{self.path} is not empty and no curation; give another --out")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            held = hold(self.path)
        except ValueError as error:
            raise InputError(str(error)) from None
        try:
            self._check_same(config, digest)
            self.write(self.path / RECIPE, recipe.encode())
            self.write(self.path / STATE, json.dumps({"rows": digest}).encode())
            yield
        finally:
            if held is not None:
                os.close(held)

    def _check_same(self, config: Config, digest: str) -> None:
        saved, state = self.path / RECIPE, self.path / STATE
        if not saved.is_file() or not state.is_file():
            return  # nothing was asked yet
        if changed := [c for c in differences(load(saved).config, config) if _changes_answers(c.key)]:
            listed = "".join(f"\n  {change}" for change in changed)
            raise InputError(f"{self.path} was begun with another recipe:{listed}\nGive another --out for this one")
        if json.loads(state.read_text())["rows"] != digest:
            raise InputError(
                f"the rows (or benchmarks, or a template) are not those that {self.path} was begun with; give another "
                "--out"
            )

    def write(self, path: Path, content: bytes) -> None:
        """The whole file, or nothing of it. Raises Stop if it cannot be written."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(content)

    def rows(self, block: int) -> Path:
        return self.path / "rows" / f"{block:05d}.jsonl"

    def fates(self, block: int) -> Path:
        return self.path / "fates" / f"{block:05d}.jsonl"

    def left(self, blocks: int) -> list[int]:
        """Those of so many blocks that are not done."""
        return [block for block in range(blocks) if not self.rows(block).is_file()]

    def answers(self, block: int, name: str) -> Path:
        return self.path / "answers" / f"{block:05d}-{name}.jsonl"

    def finish(self, block: int, fates: Sequence[Decision], sources: Sequence[str]) -> None:
        """A block's fates and, last of all, its rows."""
        pictures = Pictures(self)
        kept = [record(fate.row, pictures.part) for _, fate in fates if fate.dropped is None]
        told = [
            {
                "id": fate.row.prompt.id,
                "source": sources[fate.row.source],
                "filter": name,
                "dropped": fate.dropped,
                "detail": fate.detail,
                "question": shortened(fate.row.prompt),
                "curation": dict(fate.row.notes),
            }
            for name, fate in fates
        ]
        self.write(self.fates(block), _lines(told))
        self.write(self.rows(block), _lines(kept))


class Pictures:
    """How rows name theirs: by a path from their file, and those that came as bytes get a file."""

    def __init__(self, out: Out) -> None:
        self._out = out

    def part(self, picture: Picture) -> dict[str, Any]:
        if not isinstance(picture.source, bytes):
            return {"type": "image", "image": os.path.relpath(picture.source, (self._out.path / "rows").resolve())}
        path = self._out.path / "pictures" / picture.digest
        if not path.is_file():
            self._out.write(path, picture.source)
        return {"type": "image", "image": f"../pictures/{picture.digest}"}


def record(row: Row, part_of: Callable[[Picture], dict[str, Any]] = image_part) -> dict[str, Any]:
    """A row as a training row."""
    prompt = row.prompt
    optional = {
        "ground_truth": prompt.ground_truth,
        "reference": prompt.reference,
        "messages_pool": list(prompt.messages_pool) or None,
        "pool_accuracy": prompt.pool_accuracy,
        "pool_accepted": list(prompt.pool_accepted) or None,
    }
    return {
        "id": prompt.id,
        "task": prompt.task,
        "messages": messages_of(prompt, part_of),
        **{name: value for name, value in optional.items() if value is not None},
        "meta": {**prompt.meta, "curation": {**prompt.meta.get("curation", {}), **row.notes}},
    }


def shortened(prompt: Prompt, most: int = 200) -> str:
    """The last turn's text, for a report."""
    content = prompt.messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [p.get("text", "(picture) ") for p in content]
    text = "".join(parts)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _changes_answers(key: str) -> bool:
    """Whether an option has a part in what is asked or kept; an endpoint's name and server may change."""
    return key.startswith(MATTER) or (key.startswith("endpoints.") and key.endswith(".model"))


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode("utf-8", "backslashreplace")
