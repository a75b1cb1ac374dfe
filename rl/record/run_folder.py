"""Reads and writes the folder of a run, which contains recipe, metrics and samples. After a crash, the last
line of metrics.jsonl may be incomplete, and there may be files with the suffix .partial. This module ignores this line
and these files.

RUN_DIR contains recipe.yaml, metrics.jsonl, rollouts/000001.jsonl.gz, checkpoints/ and policy/. This module does not
import torch. If a file cannot be written because the disk is full or read-only, the functions raise a Stop that names
the file.
"""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Self

from rl.record import metrics as meaning
from rl.record.disk import hold, replacing, to_disk, write_file, writing
from rl.types import Picture, Prompt, Scored

Save = Literal["all", "none"] | int


class RunFolder:
    """The files of one run. Use `create` for a new run and `resume` for an existing one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.recipe = self.path / "recipe.yaml"
        self.rewards = self.path / "rewards.json"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.timeline = self.path / "timeline.json"  # exists if log.timeline is true
        self.resumable = self.path  # argument of --resume; in a chain, this is the folder of the chain
        self._lock: IO[bytes] | None = None  # while this process has the lock
        self._last = max((line["iteration"] for line in self.read_metrics()), default=-1)

    @classmethod
    def create(cls, path: str | Path, recipe: str) -> Self:
        """Makes the folder of a new run and writes `recipe` (YAML text) to it.

        Raises ValueError in the same cases as `make_run_folder`.
        """
        make_run_folder(Path(path))
        folder = cls(path)
        folder.lock()
        folder.rollouts.mkdir(exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        folder.write_recipe(recipe)
        return folder

    @classmethod
    def resume(cls, path: str | Path) -> Self:
        """Opens the folder of an existing run. Call `truncate_after` before writing.

        Raises ValueError if `path` is not a run folder.
        """
        if not (Path(path) / "recipe.yaml").is_file():
            raise ValueError(f"{path} is no run folder: it has no recipe.yaml; start a run with --output")
        folder = cls(path)
        folder.lock()
        return folder

    def lock(self) -> None:
        """Locks the folder until this process ends. Raises ValueError if another run has the lock."""
        self._lock = hold(self.path)

    def release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_recipe(self, recipe: str) -> None:
        """Replaces recipe.yaml. `recipe` is the resolved recipe. It has no secrets, only the names of their environment
        variables."""
        write_file(self.recipe, recipe.encode())

    def write_rewards(self, first: int, versions: Mapping[str, Mapping[str, str]]) -> bool:
        """Records the versions of the rewards in rewards.json, with the first iteration that they score. Returns True
        if they differ from the versions of the iterations before."""
        entries = json.loads(self.rewards.read_bytes()) if self.rewards.exists() else []
        entries = [entry for entry in entries if entry["first_iteration"] < first]
        changed = bool(entries) and entries[-1]["rewards"] != versions
        if changed or not entries:
            entries.append({"first_iteration": first, "rewards": versions})
        write_file(self.rewards, json.dumps(entries, indent=1).encode() + b"\n")
        return changed

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Appends one iteration's line and waits until it is on disk.

        Writes nothing and raises ValueError in three cases: a metric has no entry in rl/record/metrics.yaml, a value is
        NaN or infinite, or the iteration is not later than the last written iteration.
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
        """Returns the lines of all iterations. After a crash, the last line may be incomplete; it is then
        skipped."""
        if not self.metrics.exists():
            return []
        whole, _, _cut = self.metrics.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def write_rollouts(self, iteration: int, scored: Sequence[Scored], save: Save = "all") -> None:
        """Writes samples of an iteration. `save` is "all", "none" or a number of samples. The written samples are then
        evenly spaced.

        The file is either complete or absent. The same samples always give the same bytes.
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
                # UTF-8 cannot encode a lone surrogate. The JSON escape of the surrogate is written instead.
                packed.write(_json_line(sample_record(sample)).encode("utf-8", "backslashreplace"))

    def truncate_after(self, iteration: int) -> None:
        """Deletes the metrics and samples of all iterations after `iteration`. A resumed run then records each
        iteration exactly once."""
        kept = [line for line in self.read_metrics() if line["iteration"] <= iteration]
        with writing(self.path):
            if self.metrics.exists():
                write_file(self.metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.rollouts.mkdir(exist_ok=True)
            for entry in sorted(self.rollouts.iterdir()):
                number = entry.name.partition(".")[0]
                if entry.suffix == ".partial" or (number.isdigit() and int(number) > iteration):
                    entry.unlink()
        self._last = max((line["iteration"] for line in kept), default=-1)


def make_run_folder(path: Path) -> None:
    """Makes an empty folder for a run.

    Raises ValueError if `path` is a file, or a folder that is not empty. The folder may contain empty folders and
    `.partial` files, because a run may have made them before it was killed.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a new folder as --output")
    found = sorted(entry for entry in path.iterdir()) if path.is_dir() else []
    if any(entry.suffix != ".partial" and not _is_empty(entry) for entry in found):
        raise ValueError(_occupied(path, [entry.name for entry in found]))
    path.mkdir(parents=True, exist_ok=True)


def _is_empty(entry: Path) -> bool:
    return entry.is_dir() and not any(entry.iterdir())


def sample_record(sample: Scored) -> dict[str, Any]:
    """Returns one sample as it is written to a file in rollouts/: with data row, response and score. The reward of an
    invalid sample is None."""
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


def image_part(picture: Picture) -> dict[str, Any]:
    """Returns the part of a chat message that stands for a picture. It contains the path of the picture, or the digest
    if the picture is stored as bytes."""
    if isinstance(picture.source, bytes):
        return {"type": "image", "digest": picture.digest}
    return {"type": "image", "image": str(picture.source)} | as_stored(picture)


def as_stored(picture: Picture) -> dict[str, bool]:
    """Returns the key of an image part that says that the picture must not be turned, or {}."""
    return {} if picture.upright else {"as_stored": True}


def messages_of(prompt: Prompt, part_of: Callable[[Picture], dict[str, Any]] = image_part) -> list[dict[str, Any]]:
    """Returns the chat of a prompt. Each image placeholder is replaced by `part_of(picture)`."""
    pictures = iter(prompt.images)

    def content(given: str | Sequence[Mapping[str, Any]]) -> Any:
        if isinstance(given, str):
            return given
        return [part_of(next(pictures)) if part["type"] == "image" else dict(part) for part in given]

    return [{"role": m["role"], "content": content(m["content"])} for m in prompt.messages]


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns a copy of `value` in which text replaces everything that JSON cannot represent (NaN, a set, ...). Without
    this replacement, an unusual value in a reward's details would end the run."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)) or meaning.is_finite_number(value):
        return value
    return str(value)
