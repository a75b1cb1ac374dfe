"""Finds, reads and writes the tensors in the safetensors files of a model folder.

Folders differ in the number of files, in an index, and in the names of tensors. This module gives every tensor the name
that it has in the published folders.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rl.model.config_file import UNQUANTIZED, CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_SHARDS = 10_000
GIT_LFS = b"version https://git-lfs"
PREFIXES = (
    ("model.language_model.", "model."),
    ("model.vision_model.", "vision_model."),
    ("model.visual.", "visual."),
    ("model.vit_large_projector.", "vit_large_projector."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""(prefix that transformers or vLLM uses, prefix in the published folders)."""
UNNEEDED = ("rotary_emb.inv_freq",)  # ends of the names of tensors that are computed from the config
_QUANTIZED = re.compile(r"\.(?:weight_scale(?:_inv)?|qweight|qzeros|absmax|quant_map|quant_state\..*|SCB)$")
_SHARD = re.compile(r"(.*?)-?(\d+)-of-(\d+)\.safetensors")


def published_name(name: str) -> str:
    """Returns the name of a tensor in the published folders: `model.language_model.norm.weight` becomes
    `model.norm.weight`."""
    for other, ours in PREFIXES:
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored, and its form. `shape` is a tuple of sizes; `dtype` is safetensors' name of the dtype,
    such as "BF16"."""

    file: Path
    name: str  # the name in the file
    shape: tuple[int, ...] = field(default=())
    dtype: str = ""


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Returns {published name: place} of all tensors in a folder. Reads only the headers of the files.

    Raises: CheckpointError if a file is missing, damaged or quantized, or if two tensors have the same name.
    """
    folder, found = Path(folder), dict[str, Stored]()
    for file in _files(folder):
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if _QUANTIZED.search(name):
                    raise CheckpointError(
                        f"{file} contains a quantized model (it has the tensor {name}); {UNQUANTIZED}"
                    )
                if name.endswith(UNNEEDED):
                    continue
                entry, ours = opened.get_slice(name), published_name(name)
                if ours in found:
                    raise CheckpointError(
                        f"{folder} has the tensor {ours} twice, in {found[ours].file.name} and {file.name}; "
                        "remove the files that do not belong to the model"
                    )
                found[ours] = Stored(file, name, tuple(entry.get_shape()), entry.get_dtype())
    return found


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (published name, tensor) of each tensor in the folder, file by file."""
    stored = stored_tensors(folder)
    for file in sorted({one.file for one in stored.values()}):
        with open_tensors(file) as opened:
            for name, one in stored.items():
                if one.file == file:
                    yield name, opened.get_tensor(one.name)


def read_tensor(folder: str | Path, name: str) -> Tensor:
    """Returns the tensor with this published name. Raises KeyError if the folder does not have it."""
    one = stored_tensors(folder)[name]
    with open_tensors(one.file) as opened:
        return opened.get_tensor(one.name)


def open_tensors(file: Path) -> Any:
    """Opens a safetensors file. Raises CheckpointError with the name of the file if the file is damaged."""
    check_downloaded(file)
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no complete safetensors file ({error}); copy or download it again") from error


def check_downloaded(file: Path) -> None:
    """Raises CheckpointError if the file is a pointer of Git LFS, which stands for a file that was not downloaded."""
    with file.open("rb") as opened:
        if opened.read(len(GIT_LFS)) == GIT_LFS:
            raise CheckpointError(f"{file} is only a pointer of Git LFS; run `git lfs pull` in its folder")


def _files(folder: Path) -> list[Path]:
    """Returns the files that contain the model: those of the index, else model.safetensors, else all shards."""
    if (index := folder / INDEX).is_file():
        return sorted({folder / file for file in _weight_map(index).values()})
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    shards = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    files = [file for file in shards if file.name.startswith("model")] or [
        file for file in shards if not file.name.startswith("adapter")
    ]
    if shards and not files:
        raise CheckpointError(
            f"{folder} contains only an adapter ({shards[0].name}); merge it into its base model first"
        )
    if not files:
        raise CheckpointError(f"{folder} has no {WEIGHTS}, no {INDEX} and no shards; only safetensors are read")
    _check_complete(folder, [file.name for file in files])
    return files


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    """Raises CheckpointError if the names say that there are more shards, as in `model-00001-of-00002.safetensors`."""
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    for match in shards:
        start, digits, count = match[1], len(match[2]), min(int(match[3]), MOST_SHARDS)
        there = {int(one[2]) for one in shards if one[1] == start}
        if missing := sorted(set(range(1, count + 1)) - there):
            name = f"{start}-{missing[0]:0{digits}d}-of-{match[3]}.safetensors"
            raise CheckpointError(f"{folder} has no {name}; {len(missing)} of {count} shards are missing")


def _weight_map(index: Path) -> Mapping[str, str]:
    """Returns {tensor name: name of the file} from an index file. Raises CheckpointError if the index is damaged, or if
    a file is missing or outside of the folder."""
    check_downloaded(index)
    try:
        names = json.loads(index.read_text())["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of tensors ({type(error).__name__}: {error})") from error
    for file in sorted(set(files.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file) or not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names the file {file[:100]!r}, which the folder does not have")
    return files


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes tensors into a folder, as model.safetensors or as shards of up to 4 GB with an index. Other users can read
    the files if they can read other new files; safetensors alone would make files that only their owner can read."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder, max_shard_size="4GB")
    usual = folder / ".new"
    usual.touch()
    for file in folder.glob("*.safetensors"):
        file.chmod(usual.stat().st_mode)
    usual.unlink()
