"""Imports vLLM with the environment variables that an Engine on CPU sets. tests/support/engine_process.py forks
processes from a process that has imported this module."""

import os
from importlib import import_module

from rollout.vllm.engine import environment

os.environ.update(environment("", "cpu", threads=1, kv_cache_gib=1, verbose=False))
for library in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "rollout.vllm.step_vl"):
    import_module(library)
