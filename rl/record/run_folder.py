"""A run's folder: recipe, metrics and samples, written so that a crash at any moment leaves whole lines and files.

RUN_DIR/recipe.yaml, metrics.jsonl, rollouts/000001.jsonl.gz, checkpoints/, policy/. Knows nothing of torch. What cannot
be written (a full disk, a read-only one) raises Stop, which names the file.
"""

import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from rl.record import metrics as meaning
from rl.record.disk import hold, replacing, to_disk, writing
from rl.types import Picture, Prompt, Scored

Save = Literal["all", "none"] | int


class RunFolder:
    """Where one run writes. Make it with `create` (a new run) or `resume` (an existing one)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.timeline = self.path / "timeline.json"  # if the recipe asks for it
        self.resumable = self.path  # what --resume takes to go on
        self._held: int | None = None  # the lock, once this process has it
        self._last = max((line["iteration"] for line in self.read_metrics()), default=-1)

    @classmethod
    def create(cls, path: str | Path, recipe: str) -> Self:
        """A new run's folder with `recipe` (YAML text) in it.

        Raises ValueError if there is anything at `path`.
        """
        make_new(Path(path))
        folder = cls(path)
        folder.lock()
        folder.rollouts.mkdir(exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        folder.write_recipe(recipe)
        return folder

    @classmethod
    def resume(cls, path: str | Path) -> Self:
        """An existing run's folder; call `truncate_after` before writing.

        Raises ValueError if `path` is none.
        """
        if not (Path(path) / "recipe.yaml").is_file():
            raise ValueError(f"{path} is no run folder: it has no recipe.yaml; start a run with --output")
        folder = cls(path)
        folder.lock()
        return folder

    def lock(self) -> None:
        """Keep the folder for this process, until it ends. Raises ValueError if another run has it."""
        self._held = hold(self.path)

    def release(self) -> None:
        """Let another run have the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def write_recipe(self, recipe: str) -> None:
        """Replaces recipe.yaml, which must hold the resolved recipe with secrets only by name."""
        with writing(self.recipe), replacing(self.recipe) as file:
            file.write(recipe.encode())

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Appends one iteration's line and waits until it is on disk.

        Raises ValueError, and writes nothing, for a metric that has no sentence in rl/record/metrics.py, a NaN or
        infinity, and an iteration that is not later than the last one written.
        """
        meaning.check(metrics)
        iteration = metrics["iteration"]
        if iteration <= self._last:
            raise ValueError(f"{self.metrics} already has iteration {self._last}, so {iteration} cannot follow")
        with writing(self.metrics):
            with self.metrics.open("ab") as file:
                file.write(json.dumps(dict(metrics), allow_nan=False).encode() + b"\n")
            to_disk(self.metrics)
        self._last = iteration

    def read_metrics(self) -> list[dict[str, Any]]:
        """All iterations so far; a last line cut short by a crash is not one."""
        if not self.metrics.exists():
            return []
        whole, _, _cut = self.metrics.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def write_rollouts(self, iteration: int, scored: Sequence[Scored], save: Save = "all") -> None:
        """Writes an iteration's samples, all of them or N spread evenly over the iteration; the file
        appears whole.

        The same samples give the same bytes.
        """
        chosen = _chosen(scored, save)
        if not chosen:
            return
        path = self.rollouts / f"{iteration:06d}.jsonl.gz"
        with (
            writing(path),
            replacing(path) as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as packed,
        ):
            for sample in chosen:
                # a lone surrogate in a broken response becomes the JSON escape that stands for it
                packed.write(_json_line(sample_record(sample)).encode("utf-8", "backslashreplace"))

    def truncate_after(self, iteration: int) -> None:
        """Forgets metrics and samples of later iterations, so that a resumed run writes each exactly once."""
        kept = [line for line in self.read_metrics() if line["iteration"] <= iteration]
        with writing(self.path):
            if self.metrics.exists():
                with replacing(self.metrics) as file:
                    file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self.rollouts.mkdir(exist_ok=True)
            for entry in sorted(self.rollouts.iterdir()):
                number = entry.name.partition(".")[0]
                if entry.suffix == ".partial" or (number.isdigit() and int(number) > iteration):
                    entry.unlink()
        self._last = max((line["iteration"] for line in kept), default=-1)


def make_new(path: Path) -> None:
    """An empty folder for a run. Raises ValueError if there is anything at `path`, but for what a run leaves that was
    killed before its recipe was written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a new folder as --output")
    found = sorted(entry for entry in path.iterdir()) if path.is_dir() else []
    if any(entry.suffix != ".partial" and not _is_empty(entry) for entry in found):
        raise ValueError(_occupied(path, [entry.name for entry in found]))
    path.mkdir(parents=True, exist_ok=True)


def _is_empty(entry: Path) -> bool:
    return entry.is_dir() and not any(entry.iterdir())


def sample_record(sample: Scored) -> dict[str, Any]:
    """One line of rollouts/: the data row, then what became of it. An invalid sample has no reward."""
    rollout, prompt = sample.rollout, sample.rollout.prompt
    answers = {"ground_truth": prompt.ground_truth, "reference": prompt.reference}
    return {
        "id": prompt.id,
        "task": prompt.task,
        "messages": messages_of(prompt),
        **{name: answer for name, answer in answers.items() if answer is not None},
        "meta": dict(prompt.meta),
        **({"shown": {"messages": prompt.shown.texts, "accepted": prompt.shown.accepted}} if prompt.shown else {}),
        "response": rollout.text,
        "reward": sample.reward if sample.invalid is None else None,
        "parts": dict(sample.parts),
        "details": dict(sample.details),
        "invalid": sample.invalid,
        "finish": rollout.finish,
        "prompt_tokens": len(rollout.prompt_ids),
        "response_tokens": len(rollout.response_ids),
        "policy_step": rollout.policy_step,
        **({"pieces": rollout.pieces} if rollout.pieces else {}),
    }


def _occupied(path: Path, found: list[str]) -> str:
    if "recipe.yaml" in found:
        return f"{path} already holds a run; continue it with --resume {path}, or give another --output"
    names = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return f"{path} is not empty ({names}); give a new folder as --output"


def _chosen(scored: Sequence[Scored], save: Save) -> Sequence[Scored]:
    if save == "none":
        return []
    if save == "all" or save >= len(scored):
        return scored
    return [scored[place * len(scored) // save] for place in range(save)]


def by_name(picture: Picture) -> dict[str, Any]:
    """A picture's part of a message: its path or, if it came as bytes, its digest."""
    if isinstance(picture.source, bytes):
        return {"type": "image", "digest": picture.digest}
    return {"type": "image", "image": str(picture.source)}


def messages_of(prompt: Prompt, part_of: Callable[[Picture], dict[str, Any]] = by_name) -> list[dict[str, Any]]:
    """The chat with each placeholder naming its picture again."""
    pictures = iter(prompt.images)

    def content(given: str | Sequence[Mapping[str, Any]]) -> Any:
        if isinstance(given, str):
            return given
        return [part_of(next(pictures)) if part["type"] == "image" else dict(part) for part in given]

    return [{"role": m["role"], "content": content(m["content"])} for m in prompt.messages]


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: what it cannot (NaN, a set, ...) becomes its text, because an odd detail
    recorded by somebody's reward must not end a run."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (str, bool)) or meaning.is_finite_number(value):
        return value
    return str(value)
