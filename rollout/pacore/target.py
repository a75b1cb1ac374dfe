"""Selects where a command calls its model: at an endpoint that the user gives, or on a new server that ends together
with the command."""

import argparse
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.model import hf_folder
from rl.model.config import overrides, positions
from rl.types import Resize
from rollout.pacore.client import EndpointClient
from rollout.pacore.prompt import synthesis_template
from rollout.vllm.plugin import CONFIG_FORMAT
from rollout.vllm.server import KEY_ENV, serving


@dataclass(frozen=True)
class ModelTarget:
    """A model to call. If `url` is given, the endpoint at this URL serves the model. Otherwise `model` is a folder or
    hub id, and `serve` starts a server for it."""

    model: str
    url: str | None = None
    name: str | None = None  # the model's name at the endpoint
    key_env: str | None = None
    device: str = "cpu"
    max_length: int | None = None  # maximum tokens of prompt and response together
    yarn: float | None = None
    options: Mapping[str, str | bool] | None = None  # additional arguments of vLLM's server
    concurrency: int = 256

    def weights_digest(self) -> str | None:
        """Returns a digest of the sizes and modification times of the weight files, or None if the model is not a local
        folder."""
        if self.url is not None or not Path(self.model).is_dir():
            return None
        files = [(file.name, file.stat()) for file in sorted(Path(self.model).glob("*.safetensors"))]
        stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]

    def synthesis_template(self, template: Path | None) -> Path | None:
        """Returns `template` if it is given, else the template in the model's folder. With an endpoint, the model's
        folder is unknown, so `template` is returned even if it is None."""
        return template if self.url else synthesis_template(hf_folder.local_folder(self.model), template)

    def shown_size(self) -> Resize | None:
        """Returns the function that computes the size in which the model is shown a picture. With an endpoint, the
        model's folder is unknown, so the result is None."""
        return None if self.url else hf_folder.shown_size(hf_folder.local_folder(self.model))

    @contextmanager
    def serve(self) -> Iterator[str]:
        """A context manager that yields the model's URL. If there is no `url`, a server is started, and this server
        ends with the context.

        Raises: ValueError, RuntimeError.
        """
        if self.url is not None:
            yield self.url
            return
        folder = hf_folder.local_folder(self.model)
        options = serve_options(folder, self.max_length, self.yarn, self.options or {})
        with serving(str(folder), self.device, options) as server:
            yield server.url()

    @asynccontextmanager
    async def client(self, url: str, fields: Mapping[str, Any]) -> AsyncIterator[EndpointClient]:
        """A context manager that yields a client of the model.

        Args:
            url: the URL that `serve` yields.
            fields: fields that are added to every request.
        """
        name = self.name or (self.model if self.url else str(hf_folder.local_folder(self.model)))
        key_env = self.key_env if self.url else KEY_ENV
        async with EndpointClient(url, name, concurrency=self.concurrency, fields=fields, key_env=key_env) as client:
            yield client


def serve_options(
    folder: Path, max_length: int | None, yarn: float | None, more: Mapping[str, str | bool]
) -> dict[str, str | int | float | bool]:
    """Returns the arguments with which vLLM's server is started for inference. The arguments in `more` are included.

    Raises: ValueError if `max_length` is more than the model's number of positions.
    """
    config = hf_folder.read_config(folder, yarn=yarn)
    trained = positions(config)
    if max_length is not None and max_length > trained:
        raise ValueError(
            f"--max-length {max_length} is more than the {trained} positions of {folder}; extend the positions with "
            f"--yarn {-(-max_length * (yarn or 1) // trained):g}"
        )
    options: dict[str, str | int | float | bool] = {
        "max-model-len": max_length or trained, "generation-config": "vllm", "config-format": CONFIG_FORMAT,
    }  # fmt: skip
    if (dtype := getattr(getattr(config, "text_config", config), "dtype", None)) is not None:
        options["dtype"] = str(dtype).removeprefix("torch.")  # by default, vLLM converts float32 to a 16-bit dtype
    if yarn:
        options["hf-overrides"] = json.dumps(overrides(config))
    return {**options, **more}


def add_target_options(p: argparse.ArgumentParser) -> None:
    """Adds the command-line options that say how the model is served."""
    p.add_argument("--url", help="endpoint that serves the model, such as http://host:8000/v1; default: start a server")
    p.add_argument("--key-env", metavar="NAME", help="environment variable that contains the endpoint's key")
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="the server's device; auto: cuda if possible"
    )
    p.add_argument("--max-length", type=int, help="maximum tokens of a sequence; default: the model's maximum")
    p.add_argument("--yarn", type=float, metavar="FACTOR", help="extend the model's positions by this factor with YaRN")
    p.add_argument(
        "--serve", action="append", default=[], metavar="NAME[=VALUE]", help="an additional argument of vLLM's server"
    )
    p.add_argument("--concurrency", type=int, default=256, help="maximum number of simultaneous replies (default: 256)")


def target_of(args: argparse.Namespace) -> ModelTarget:
    """Returns the target that the options of `add_target_options` describe. Raises ValueError."""
    parts = [option.partition("=") for option in args.serve]
    options = {name: value if sign else True for name, sign, value in parts}
    if args.url and (options or args.yarn or args.max_length):
        raise ValueError("--serve, --yarn and --max-length only work without --url; leave out --url or these options")
    return ModelTarget(
        args.model,
        url=args.url,
        key_env=args.key_env,
        device=_resolve_device(args.device),
        max_length=args.max_length,
        yarn=args.yarn,
        options=options,
        concurrency=args.concurrency,
    )


def _resolve_device(device: str) -> str:
    """Replaces `auto` with cuda if there is a GPU, else with cpu."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
