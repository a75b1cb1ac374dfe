"""The folder that a curation writes: its recipe, and the rows and decisions of every block.

Files appear with all of their content or not at all. The rows of a block are written last.

Tested in tests/stages/curation/test_filters.py.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.exits import InputError, as_input_error
from rl.recipe.resolve import differences, load
from rl.record.disk import hold, write_file, writing
from rl.record.run_folder import image_part, messages_of
from rl.types import Picture, Prompt
from stages.curation.filters import CandidateRow, Decision

RECIPE, STATE = "recipe.yaml", "state.json"
RELEVANT = (
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


@dataclass(frozen=True)
class CurationFolder:
    """The output folder of a curation."""

    path: Path

    @contextmanager
    def locked(self, config: Config, recipe: str, digest: str) -> Iterator[None]:
        """Locks the folder for this process. It is new, or holds the same curation, unfinished.

        Args:
            digest: of the rows and all other files that the filters use.
        Raises: InputError if it holds something else, or if another process writes there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give a folder as --out")
        names = {entry.name.removesuffix(".partial") for entry in self.path.iterdir()} if self.path.exists() else set()
        if names and RECIPE not in names:
            raise InputError(f"{self.path} is not empty and holds no curation; give another --out")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with as_input_error():
            held = hold(self.path)
        try:
            self._check_same(config, digest)
            write_file(self.path / RECIPE, recipe.encode())
            write_file(self.path / STATE, json.dumps({"rows": digest}).encode())
            yield
        finally:
            if held is not None:
                os.close(held)

    def _check_same(self, config: Config, digest: str) -> None:
        saved, state = self.path / RECIPE, self.path / STATE
        if not saved.is_file() or not state.is_file():
            return  # the curation ended before it called a model
        if changed := [c for c in differences(load(saved).config, config) if _changes_answers(c.key)]:
            listed = "".join(f"\n  {change}" for change in changed)
            raise InputError(f"{self.path} was begun with another recipe:{listed}\nGive another --out for this one")
        if json.loads(state.read_text())["rows"] != digest:
            raise InputError(
                f"the rows (or benchmarks, or a template) are not those that {self.path} was begun with; give another "
                "--out"
            )

    def rows(self, block: int) -> Path:
        """The file of a block's rows."""
        return self.path / "rows" / f"{block:05d}.jsonl"

    def decisions(self, block: int) -> Path:
        """The file of a block's decisions."""
        return self.path / "fates" / f"{block:05d}.jsonl"

    def unfinished(self, blocks: int) -> list[int]:
        """The numbers of the blocks, of `blocks` in all, that are not finished."""
        return [block for block in range(blocks) if not self.rows(block).is_file()]

    def answers(self, block: int, filter_name: str) -> Path:
        """The file of the answers that a filter got for a block."""
        return self.path / "answers" / f"{block:05d}-{filter_name}.jsonl"

    def finish(self, block: int, decisions: Sequence[Decision], sources: Sequence[str]) -> None:
        """Writes a block's decisions and then its rows.

        Args:
            sources: paths of data.train, in order.
        """
        rows = [row_record(one.row, self._picture_part) for one in decisions if one.dropped is None]
        records = [
            {
                "id": one.row.prompt.id,
                "source": sources[one.row.source],
                "filter": one.filter,
                "dropped": one.dropped,
                "detail": one.detail,
                "question": shortened(one.row.prompt),
                "curation": dict(one.row.notes),
            }
            for one in decisions
        ]
        write_file(self.decisions(block), _lines(records))
        write_file(self.rows(block), _lines(rows))

    def _picture_part(self, picture: Picture) -> dict[str, Any]:
        """The part of a message that shows a picture, by a path that is relative to the rows' file. A picture that came
        as bytes is written to a file."""
        if not isinstance(picture.source, bytes):
            return {"type": "image", "image": os.path.relpath(picture.source, (self.path / "rows").resolve())}
        path = self.path / "pictures" / picture.digest
        if not path.is_file():
            write_file(path, picture.source)
        return {"type": "image", "image": f"../pictures/{picture.digest}"}


def row_record(row: CandidateRow, part_of: Callable[[Picture], dict[str, Any]] = image_part) -> dict[str, Any]:
    """A row as JSON values, in the format of training rows.

    Args:
        part_of: makes the part of a message that shows a picture.
    """
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
    """The text of the last turn, for the report, at most `most` characters."""
    content = prompt.messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [p.get("text", "(picture) ") for p in content]
    text = "".join(parts)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _changes_answers(key: str) -> bool:
    """True if an option can change answers or decisions. The name and the server of an endpoint may change."""
    return key.startswith(RELEVANT) or (key.startswith("endpoints.") and key.endswith(".model"))


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode("utf-8", "backslashreplace")
