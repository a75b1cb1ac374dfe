"""Reads and writes Hugging Face model folders (config.json and safetensors).

The parameters of a model have the same names as its tensors on disk.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from rl.model import attention, config_file
from rl.model.architecture import Architecture, ImageToken
from rl.model.config import register, with_yarn
from rl.model.config_file import CheckpointError
from rl.model.registry import FAMILIES, family
from rl.model.text import FAMILIES as CAUSAL_CLASSES
from rl.model.text import check_decoder
from rl.model.weight_files import INDEX, Stored, check_downloaded, read_tensors, save_tensors, stored_tensors
from rl.types import Resize

VALUE_HEAD = "value_head.weight"


def local_folder(path: str | Path) -> Path:
    """Returns `path` if it is a folder. Otherwise, `path` must be a hub id. The function then downloads the model if
    necessary, and returns the folder of the local copy."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or str(path).count("/") != 1:
        raise CheckpointError(f"model.path {path} is not a folder, and it is not a hub id like owner/name")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:  # the hub client raises many types of errors; all of them mean a failed download
        raise CheckpointError(f"model.path {path}: no such folder, and the hub download failed ({error})") from error


def read_config(folder: str | Path, *, yarn: float | None = None) -> PretrainedConfig:
    """Returns the folder's config. If `yarn` is given, YaRN extends the model's positions by this factor.

    Raises: CheckpointError with the folder's name if config.json is missing or cannot be used.
    """
    register()
    raw = config_file.read(folder)
    kind = raw.pop("model_type", None)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{folder}/config.json: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if kind in CAUSAL_CLASSES:  # some folders name another class, or none
        raw["architectures"] = [CAUSAL_CLASSES[kind]]
    try:
        config = AutoConfig.for_model(kind, **raw)
        FAMILIES[kind].complete(config, Path(folder))
        return with_yarn(config, yarn)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises errors of many classes for a damaged config
        raise CheckpointError(f"{folder}/config.json: {error or type(error).__name__}") from error


def image_token(config: PretrainedConfig) -> ImageToken | None:
    """Returns the image token of models with this config, or None if these models accept no pictures."""
    return family(config).image_token(config)


def shown_size(folder: str | Path) -> Resize | None:
    """Returns the function that computes the size in which the folder's model is shown a picture, or None if the model
    accepts no pictures."""
    token = image_token(read_config(folder))
    return token.shown if token else None


def build(config: PretrainedConfig, *, device: str = "meta") -> Architecture:
    """Builds the model of a config, with attention over packed rows. Its weights are random. On the device "meta" the
    weights take no memory."""
    check_decoder(getattr(config, "text_config", config))
    with torch.device(device):
        model = family(config)(config)
    model.model.set_attn_implementation(attention.NAME)
    return model


def check(folder: str | Path, *, yarn: float | None = None) -> PretrainedConfig:
    """Checks a model folder and returns its config. Does not read the weights, so that a dry run can make this check.

    Raises: CheckpointError if tensors are missing, unknown or of the wrong shape. The message names these tensors.
    """
    folder = Path(folder)
    config = read_config(folder, yarn=yarn)
    companions(folder)
    try:
        model = build(config)
    except Exception as error:  # sizes that do not fit together raise errors of many classes
        raise CheckpointError(f"{folder}/config.json: {type(error).__name__}: {error}") from error
    _check_tensors(folder, stored_tensors(folder), state(model), state(model, tied=True), "does not fit its config")
    return config


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{len(names)} {kind} tensors: {shown}. "


def state(model: nn.Module, *, tied: bool = False) -> dict[str, Tensor]:
    """Returns the model's tensors, keyed by their names on disk. A head that is tied to the embedding is not stored on
    disk, so it is included only if `tied` is True."""
    tensors = dict(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False) and not tied:
        tensors.pop("lm_head.weight", None)
    return tensors


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    prepare: Callable[[Architecture], None] = lambda model: None,
    local_shard: Callable[[Tensor, Tensor], Tensor] | None = None,
    yarn: float | None = None,
) -> Architecture:
    """Loads the model in a folder with all its weights.

    Args:
        prepare: a function that is called with the model before its weights take memory. The function may split the
            parameters over processes.
        local_shard: a function that gets a full tensor and the parameter of the same name. It returns this process's
            shard of the full tensor. None: this process keeps the full tensors.
        yarn: the factor by which YaRN extends the positions.
    Raises: CheckpointError if tensors are missing, unknown or of the wrong shape. The message names these tensors.
    """
    folder = Path(folder)
    model = build(check(folder, yarn=yarn))
    prepare(model)
    empty = dict(model.state_dict())
    loaded: dict[str, Tensor] = {}
    for name, full in read_tensors(folder):
        loaded[name] = local_shard(full.to(dtype), empty[name]) if local_shard else full.to(device, dtype)
    if getattr(model.config, "tie_word_embeddings", False):
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    model.load_state_dict(loaded, assign=True)
    if getattr(model.config, "tie_word_embeddings", False):
        # Because of assign=True, the head and the embedding are now two parameters. Here they become one again.
        model.lm_head.weight = model.model.embed_tokens.weight
    model.materialize(device)
    return model.eval()


def check_critic(folder: str | Path, config: PretrainedConfig) -> None:
    """Checks that a folder contains a critic for a model with this config. A critic consists of the decoder and a value
    head.

    Raises: CheckpointError if tensors are missing, unknown or of the wrong shape. The message names these tensors.
    """
    folder, model = Path(folder), build(config)
    expected = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    hidden = getattr(config, "text_config", config).hidden_size
    expected[VALUE_HEAD] = torch.empty((1, hidden), device="meta")
    _check_tensors(folder, stored_tensors(folder), expected, expected, "is no critic of this model")


def _check_tensors(
    folder: Path,
    stored: Mapping[str, Stored],
    needed: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor],
    problem: str,
) -> None:
    """Raises CheckpointError if tensors are missing, are not in `allowed`, or have another shape. The message begins
    with the folder and `problem`."""
    missing, extra = sorted(needed.keys() - stored.keys()), sorted(stored.keys() - allowed.keys())
    if missing or extra:
        raise CheckpointError(f"{folder} {problem}: {_listed('missing', missing)}{_listed('unknown', extra)}")
    for name, wanted in needed.items():
        if (got := stored[name].shape) != tuple(wanted.shape):
            raise CheckpointError(
                f"{stored[name].file}: {name} has shape {got}, but the config needs {tuple(wanted.shape)}"
            )


def save(
    model: Architecture,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    templates: Mapping[str, str] = MappingProxyType({}),
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model folder that `load`, transformers and vLLM can read.

    Args:
        source: a model folder whose tokenizer, templates and generation config are copied.
        templates: file name -> text. These files are written instead of the files of the same name in `source`.
        tensors: the tensors to write. None means the result of `state(model)`.
    """
    folder = Path(folder)
    tensors = state(model) if tensors is None else tensors
    save_tensors({model.disk_name(name): tensor for name, tensor in tensors.items()}, folder)
    config_file.write(model.config, folder, next(iter(tensors.values())).dtype)
    for name, text in templates.items():
        (folder / name).write_text(text, encoding="utf-8")
    if source is not None:
        _copy_companions(Path(source), folder)


def companions(source: Path) -> list[Path]:
    """Returns the files of a model folder that belong to every model trained from it: tokenizer, templates, config,
    generation config and the model's own Python files, but no weights. The Python files are only copied, never run;
    other programs need them to load the model.

    Raises: CheckpointError if such a file is only a pointer of Git LFS, or a link to a file outside of the folder,
        because whatever the link names would be copied into the saved model. The links in a local copy of a hub model
        are allowed.
    """
    inside = [source.resolve()]
    if source.parent.name == "snapshots":
        inside.append(source.parent.parent.resolve() / "blobs")
    found = [
        f
        for f in sorted(source.iterdir())
        if f.suffix in {".json", ".jinja", ".txt", ".model", ".py"} and f.name != INDEX and f.is_file()
    ]
    for file in found:
        if not any(file.resolve().is_relative_to(folder) for folder in inside):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside of the model folder; replace it by a copy"
            )
        check_downloaded(file)
    return found


def _copy_companions(source: Path, folder: Path) -> None:
    """Copies the companions, but does not replace files that `folder` already has."""
    for file in companions(source):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
