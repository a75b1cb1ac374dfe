"""Reads and writes the config.json of a model folder.

A model folder may come from a stranger, so nothing in its config may crash, fill the memory or run code. transformers
makes lists with one entry per layer and per label while it reads a config, so these numbers are checked before any
library gets the config.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import dtype as Dtype
    from transformers import PretrainedConfig

CONFIG, QUANTIZATION = "config.json", "hf_quant_config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
MOST_BYTES = 16 << 20
MOST_LAYERS = 4096  # the largest public decoders have fewer than 200 layers
LARGEST = 2**53  # the largest integer that every reader of JSON can represent
COUNTS = ("layers", "num_labels", "depth")  # keys that end with one of these words count layers or labels
BOOLEANS = {"true": True, "false": False}
UNQUANTIZED = "training needs weights in bfloat16, float16 or float32. Use the unquantized release of the model"


class CheckpointError(ValueError):
    """Raised if a model folder cannot be used. The error message gives the folder and the reason."""


def read(folder: str | Path) -> dict[str, Any]:
    """Returns the content of a folder's config.json. The strings "true" and "false" become booleans, because some
    published configs contain such strings.

    Raises: CheckpointError if config.json is missing, is no JSON object, is too large, has a number that no model has,
        or is the config of a quantized model.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not a Hugging Face model folder")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; a config has at most {MOST_BYTES:,}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        config = with_booleans(config)
        for name, value in _entries(config):
            _check_number(name, value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {str(error) or type(error).__name__}") from error
    _check_not_quantized(Path(folder), config)
    return config


def preprocessor(folder: Path) -> dict[str, Any]:
    """Returns the options of a folder's image processor. Raises CheckpointError if they are missing."""
    for name, key in ((PREPROCESSOR, None), (PROCESSOR, "image_processor")):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                found = found if key is None else found[key]
                if isinstance(found, dict):
                    return found
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
    raise CheckpointError(f"{folder} has no {PREPROCESSOR} with the options of its image processor")


def write(config: "PretrainedConfig", folder: Path, dtype: "Dtype") -> None:
    """Writes a config.json that transformers 4 and 5 and vLLM read in the same way. `dtype` is the dtype of the saved
    tensors.

    transformers 5 stores the rotary positions as `rope_parameters`. transformers 4 does not know this key, and would
    use a base of 10,000 without a warning. It reads `rope_theta` and `rope_scaling`, which are written too.
    """
    config = deepcopy(config)
    config.__dict__.pop("preprocessor", None)  # it has a file of its own
    for part in (config, config.get_text_config()):
        part.dtype = dtype
    config.save_pretrained(folder)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for part in (values, values.get("text_config")):
        if isinstance(part, dict) and isinstance(rope := part.get("rope_parameters"), dict):
            scaling = {k: v for k, v in rope.items() if k != "rope_theta" and (k, v) != ("partial_rotary_factor", 1.0)}
            part["rope_theta"] = rope.get("rope_theta")
            part["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of all values that are no objects or lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _entries(inner, f"{name}[{number}]")
    else:
        yield name, value


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if abs(value) > LARGEST and not isinstance(value, float):
        raise ValueError(f"{name} is {value:.3g}, which is larger than any size of a model")
    if name.endswith(COUNTS) and not 0 <= value <= MOST_LAYERS:
        raise ValueError(f"{name} is {value}; it must be from 0 to {MOST_LAYERS:,}")


def with_booleans(value: Any) -> Any:
    """Returns a copy of a JSON value in which booleans replace the strings "true" and "false"."""
    if isinstance(value, dict):
        return {key: with_booleans(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_booleans(inner) for inner in value]
    return BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value


def _check_not_quantized(folder: Path, config: dict[str, Any]) -> None:
    found = config.get("quantization_config")
    text_config = config.get("text_config")
    if not found and isinstance(text_config, dict):
        found = text_config.get("quantization_config")
    if not found and not (folder / QUANTIZATION).is_file():
        return
    method = found.get("quant_method", "unknown method") if isinstance(found, dict) else "unknown method"
    raise CheckpointError(f"{folder} contains a quantized model ({method}); {UNQUANTIZED}")
