"""The output folder of a curation. It contains the recipe, and the rows and decisions of every block.

Each file is written completely or not at all. The rows file of a block is written last.

Tested in tests/stages/curation/test_run.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.exits import InputError, as_input_error
from rl.recipe.resolve import differences, load
from rl.record.disk import LOCK, hold, write_file, writing
from rl.record.run_folder import as_stored, image_part, messages_of
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
        """Locks the folder for this process. The folder must be new or contain the same curation.

        Args:
            digest: the digest of the rows and of all files that the filters use.
        Raises: InputError if the folder contains anything other than this curation, or if another process writes there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give a folder as --out")
        names = {entry.name.removesuffix(".partial") for entry in self.path.iterdir()} if self.path.exists() else set()
        names.discard(LOCK)
        if names and RECIPE not in names:
            raise InputError(f"{self.path} is not empty and contains no curation; give another folder as --out")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with as_input_error():
            held = hold(self.path)
        with held:
            self._check_same(config, digest)
            write_file(self.path / RECIPE, recipe.encode())
            write_file(self.path / STATE, json.dumps({"rows": digest}).encode())
            yield

    def _check_same(self, config: Config, digest: str) -> None:
        saved, state = self.path / RECIPE, self.path / STATE
        if not saved.is_file() or not state.is_file():
            return  # nothing to compare: the earlier attempt ended before it asked a model a question
        if changed := [c for c in differences(load(saved).config, config) if _changes_answers(c.key)]:
            listed = "".join(f"\n  {change}" for change in changed)
            raise InputError(
                f"the curation in {self.path} was started with another recipe:{listed}\n"
                "Use another --out for this recipe"
            )
        if json.loads(state.read_text())["rows"] != digest:
            raise InputError(
                "the rows, the benchmarks or a template have changed since the curation in "
                f"{self.path} was started; give another --out"
            )

    def rows(self, block: int) -> Path:
        """Returns the path of the file with a block's kept rows, for example rows/00000.jsonl."""
        return self.path / "rows" / f"{block:05d}.jsonl"

    def decisions(self, block: int) -> Path:
        """Returns the path of a block's decisions file."""
        return self.path / "fates" / f"{block:05d}.jsonl"

    def unfinished(self, blocks: int) -> list[int]:
        """Returns the numbers of the unfinished blocks. `blocks` is the number of all blocks."""
        return [block for block in range(blocks) if not self.rows(block).is_file()]

    def answers(self, block: int, filter_name: str) -> Path:
        """Returns the path of the file in which a filter stores the models' answers for a block."""
        return self.path / "answers" / f"{block:05d}-{filter_name}.jsonl"

    def finish(self, block: int, decisions: Sequence[Decision], sources: Sequence[str]) -> None:
        """Writes the decisions about the rows of a block, and then the kept rows.

        Args:
            sources: the paths in data.train, in order.
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
        """Returns the part of a chat message that contains a picture, for example
        `{"type": "image", "image": "pictures/1f3a"}`. The path in this part is relative to rows/.

        The picture is first copied to this path. So the curated data can be moved, and its rows name no other files.
        """
        path = self.path / "rows" / "pictures" / picture.digest
        if not path.is_file():
            write_file(path, picture.source if isinstance(picture.source, bytes) else picture.source.read_bytes())
        return {"type": "image", "image": f"pictures/{picture.digest}"} | as_stored(picture)


def row_record(row: CandidateRow, part_of: Callable[[Picture], dict[str, Any]] = image_part) -> dict[str, Any]:
    """Converts a row into JSON values, in the format of training rows.

    Args:
        part_of: a function that converts a picture into a part of a chat message.
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
    """Returns the text of the prompt's last message, for the report. A text of more than `most` characters is cut."""
    content = prompt.messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [p.get("text", "(picture) ") for p in content]
    text = "".join(parts)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _changes_answers(key: str) -> bool:
    """True if an option can change answers or decisions. Of an endpoint's options, only `model` can change answers."""
    return key.startswith(RELEVANT) or (key.startswith("endpoints.") and key.endswith(".model"))


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode("utf-8", "backslashreplace")
