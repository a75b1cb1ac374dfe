"""Who answers at inference: an endpoint, or a model that is served for as long as a command runs."""

import argparse
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.model import hf_folder
from rl.model.config import overrides, positions
from rollout.pacore.client import EndpointClient
from rollout.pacore.prompt import synthesis_template
from rollout.vllm.server import Server


@dataclass(frozen=True)
class ModelTarget:
    """Who answers: an endpoint, or a model that is served for as long as it is needed."""

    model: str
    url: str | None = None
    name: str | None = None  # the model's name at the endpoint
    key_env: str | None = None
    device: str = "cpu"
    max_length: int | None = None  # tokens of prompt and response together
    yarn: float | None = None
    options: Mapping[str, str | bool] | None = None  # further arguments of vLLM's server
    concurrency: int = 256

    def weights(self) -> str | None:
        """Changes with the files of a model folder; None for a model that is somewhere else."""
        if self.url is not None or not Path(self.model).is_dir():
            return None
        files = [(file.name, file.stat()) for file in sorted(Path(self.model).glob("*.safetensors"))]
        seen = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def template(self, named: Path | None) -> Path | None:
        """What shows messages: the file that is named, else the one that the model's folder carries; what an endpoint's
        model was trained with is not known."""
        return named if self.url else synthesis_template(hf_folder.local_folder(self.model), named)

    @contextmanager
    def served(self) -> Iterator[str]:
        """The URL. Raises: ValueError, RuntimeError."""
        if self.url is not None:
            yield self.url
            return
        folder = hf_folder.local_folder(self.model)
        server = Server(
            str(folder),
            host="127.0.0.1",
            device="cuda" if self.device == "cuda" else "cpu",
            options=serve_options(folder, self.max_length, self.yarn, self.options or {}),
            threads=os.cpu_count() or 1,
        )
        try:
            yield server.url()
        finally:
            server.close()

    @asynccontextmanager
    async def upstream(self, url: str, fields: Mapping[str, Any]) -> AsyncIterator[EndpointClient]:
        name = self.name or (self.model if self.url else str(hf_folder.local_folder(self.model)))
        async with EndpointClient(url, name, slots=self.concurrency, fields=fields, key_env=self.key_env) as upstream:
            yield upstream


def serve_options(
    folder: Path, max_length: int | None, yarn: float | None, given: Mapping[str, str | bool]
) -> dict[str, str | int | float | bool]:
    """Arguments of vLLM's server for a model that thinks.

    Raises: ValueError if sequences of `max_length` have more positions than the model was trained with.
    """
    config = hf_folder.read_config(folder, yarn=yarn)
    most = positions(config)
    if max_length is not None and max_length > most:
        raise ValueError(
            f"--max-length {max_length} is more than the {most} positions of {folder}; YaRN extends them, as in "
            f"--yarn {-(-max_length * (yarn or 1) // most):g}"
        )
    made: dict[str, str | int | float | bool] = {"max-model-len": max_length or most, "generation-config": "vllm"}
    if (dtype := getattr(getattr(config, "text_config", config), "dtype", None)) is not None:
        made["dtype"] = str(dtype).removeprefix("torch.")  # as saved; vLLM would turn float32 into something smaller
    if yarn:
        made["hf-overrides"] = json.dumps(overrides(config))
    return {**made, **given}


def add_target_options(p: argparse.ArgumentParser) -> None:
    """Options on who answers."""
    p.add_argument("--url", help="endpoint that serves the model, such as http://host:8000/v1; default: serve it here")
    p.add_argument("--key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to serve it")
    p.add_argument("--max-length", type=int, help="tokens of prompt and response; default: the model's positions")
    p.add_argument("--yarn", type=float, metavar="FACTOR", help="extend the model's positions so many times by YaRN")
    p.add_argument(
        "--serve", action="append", default=[], metavar="NAME[=VALUE]", help="further arguments of vLLM's server"
    )
    p.add_argument("--concurrency", type=int, default=256, help="requests under way at a time")


def target_of(args: argparse.Namespace) -> ModelTarget:
    """Those options. Raises ValueError."""
    parts = [one.partition("=") for one in args.serve]
    options = {name: value if sign else True for name, sign, value in parts}
    if args.url and (options or args.yarn or args.max_length):
        raise ValueError("--serve, --yarn and --max-length are for a model that is served here; leave out --url")
    return ModelTarget(
        args.model,
        url=args.url,
        key_env=args.key_env,
        device=device_of(args.device),
        max_length=args.max_length,
        yarn=args.yarn,
        options=options,
        concurrency=args.concurrency,
    )


def device_of(asked: str) -> str:
    """`auto` is a GPU if there is one."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
