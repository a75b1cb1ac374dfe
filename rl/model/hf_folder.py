"""Hugging Face folders in and out: config.json and safetensors, tensor names exactly those on disk."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from rl.model import attention
from rl.model.config import StepVLConfig, register, with_yarn
from rl.model.step_vl import StepVL
from rl.model.text import TextModel, packable

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.weight"


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message names the folder and what is wrong with it."""


def local_folder(path: str | Path) -> Path:
    """`path` itself if it is a folder, else the local copy of that hub id (downloaded if need be)."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or str(path).count("/") != 1:
        raise CheckpointError(f"model.path {path} is neither a folder nor a hub id like owner/name")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the reader
        raise CheckpointError(f"model.path {path}: no such folder, and the hub did not give it ({error})") from error


def read_config(folder: str | Path, *, yarn: float | None = None) -> PretrainedConfig:
    """The folder's config.json, its positions extended by YaRN if asked. Raises CheckpointError naming the folder."""
    register()
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        return with_yarn(AutoConfig.from_pretrained(folder), yarn)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error


def build(config: PretrainedConfig, *, device: str = "meta") -> StepVL | TextModel:
    """The architecture a config names, with packed attention: no memory on "meta", random weights elsewhere."""
    packable(getattr(config, "text_config", config))
    with torch.device(device):
        model = StepVL(config) if isinstance(config, StepVLConfig) else TextModel(config)
    model.model.set_attn_implementation(attention.NAME)
    return model


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    if (index := folder / INDEX).is_file():
        names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: folder / WEIGHTS for name in file.keys()}  # noqa: SIM118 (not a dict)


def check(folder: str | Path, *, yarn: float | None = None) -> PretrainedConfig:
    """Everything about a folder that can be known without reading its weights: cheap enough for a dry run.

    Raises CheckpointError naming missing or extra tensors and wrong shapes.
    """
    folder = Path(folder)
    config = read_config(folder, yarn=yarn)
    try:
        model = build(config)
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    files = tensor_files(folder)
    expected = state(model)
    missing, extra = (
        sorted(expected.keys() - files.keys()),
        sorted(files.keys() - state(model, tied=True).keys()),
    )
    if missing or extra:
        raise CheckpointError(f"{folder}: {_listed('missing', missing)}{_listed('unknown', extra)}")
    _check_shapes(files, expected)
    return config


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{len(names)} {kind} tensors: {shown}. "


def state(model: nn.Module, *, tied: bool = False) -> dict[str, Tensor]:
    """Tensors by their names on disk. A tied head has no tensor of its own unless `tied` asks for its name."""
    tensors = dict(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False) and not tied:
        tensors.pop("lm_head.weight", None)
    return tensors


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    prepare: Callable[[StepVL | TextModel], None] = lambda model: None,
    own: Callable[[Tensor, Tensor], Tensor] | None = None,
    yarn: float | None = None,
) -> StepVL | TextModel:
    """The model in a folder, every tensor read and checked.

    Args:
        prepare: told of the model while it takes no memory yet; may split its parameters over processes.
        own: (tensor as read, the parameter it is for) -> what this process keeps of it; by default, all.
        yarn: by what factor YaRN extends its positions.
    Raises CheckpointError naming missing or extra tensors and wrong shapes.
    """
    folder = Path(folder)
    model = build(check(folder, yarn=yarn))
    prepare(model)
    places = dict(model.state_dict())
    kept: dict[str, Tensor] = {}
    for name, read in tensors(folder):
        kept[name] = own(read.to(dtype), places[name]) if own else read.to(device, dtype)
    if getattr(model.config, "tie_word_embeddings", False):
        kept["lm_head.weight"] = kept["model.embed_tokens.weight"]
    model.load_state_dict(kept, assign=True)
    if getattr(model.config, "tie_word_embeddings", False):
        model.lm_head.weight = model.model.embed_tokens.weight  # assignment made two parameters of one
    materialize(model.model, device)
    return model.eval()


def check_critic(folder: str | Path, config: PretrainedConfig) -> None:
    """Whether a folder holds a critic of this architecture: its decoder and a value head.

    Raises CheckpointError naming missing or extra tensors and wrong shapes.
    """
    folder, model = Path(folder), build(config)
    expected = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    hidden = getattr(config, "text_config", config).hidden_size
    expected[VALUE_HEAD] = torch.empty((1, hidden), device="meta")
    files = tensor_files(folder)
    missing, extra = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys())
    if missing or extra:
        found = _listed("missing", missing) + _listed("unknown", extra)
        raise CheckpointError(f"{folder} is no critic of this model: {found}")
    _check_shapes(files, expected)


def _check_shapes(files: Mapping[str, Path], expected: Mapping[str, Tensor]) -> None:
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                wanted = tuple(expected[name].shape) if name in expected else None
                if wanted is not None and (got := tuple(opened.get_slice(name).get_shape())) != wanted:
                    raise CheckpointError(f"{file}: {name} is {got}, the config asks for {wanted}")


def tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors by name, one after the other."""
    for file in sorted(set(tensor_files(Path(folder)).values())):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)


def materialize(trunk: Any, device: str = "cpu") -> None:
    """Rotary tables are computed, not stored: rebuild what the meta device left empty."""
    trunk.rotary_emb = type(trunk.rotary_emb)(config=trunk.config, device=device)


def save(
    model: StepVL | TextModel,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    templates: Mapping[str, str] = MappingProxyType({}),
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that `load`, transformers' layout and vLLM understand.

    Args:
        source: a model folder whose tokenizer, templates and generation config go along.
        templates: file name -> text that goes along in place of the source's.
        tensors: what to write as the model's `state`, if not its own tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    given = state(model) if tensors is None else tensors
    save_torch_state_dict({n: t.detach().cpu().contiguous() for n, t in given.items()}, folder, max_shard_size="4GB")
    model.config.save_pretrained(folder)
    for name, text in templates.items():
        (folder / name).write_text(text, encoding="utf-8")
    if source is not None:
        _copy_companions(Path(source), folder)


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, templates and generation config; nothing that was written already, and no weights."""
    for file in sorted(source.iterdir()):
        companion = file.suffix in {".json", ".jinja", ".txt", ".model"} and file.name != INDEX
        if companion and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
