"""Runs vLLM without this project's plugin, in a process of its own.

As a program: reads a JSON object {"folder", "ids"} from standard input and prints the logprobs of the tokens `ids`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REMOTE_CONFIG = """
from transformers import PretrainedConfig, Qwen3Config


class VisionConfig(PretrainedConfig):
    model_type = "step_vl_vision"


class StepVLConfig(PretrainedConfig):
    model_type = "step_robotics"
    sub_configs = {"vision_config": VisionConfig, "text_config": Qwen3Config}

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = VisionConfig(**(vision_config or {}))
        self.text_config = Qwen3Config(**{k: v for k, v in (text_config or {}).items() if k != "model_type"})
        super().__init__(**kwargs)
"""
"""A file such as a published folder has: the config class that stock vLLM needs."""


def add_remote_config(folder: Path) -> None:
    """Gives a STEP3-VL folder the file configuration_step_vl.py, and its name in config.json."""
    (folder / "configuration_step_vl.py").write_text(REMOTE_CONFIG)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_step_vl.StepVLConfig"}
    (folder / "config.json").write_text(json.dumps(config))


def logprobs_of(model: Path, ids: list[int]) -> list[float]:
    """Returns the logprob of each token except the first, computed by vLLM in float32."""
    from rollout.vllm.engine import cpu_variables

    environment = os.environ | cpu_variables(1, 1) | {
        "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "HF_HOME": str(model / "hub"),
    }  # fmt: skip
    asked = json.dumps({"folder": str(model), "ids": ids})
    done = subprocess.run(
        [sys.executable, __file__], input=asked, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(
        asked["folder"], trust_remote_code=True, dtype="float32", max_model_len=512, enforce_eager=True,
        enable_prefix_caching=False, max_num_seqs=1, max_num_batched_tokens=4096, enable_chunked_prefill=False,
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": asked["ids"]}, params, use_tqdm=False)
    found: Any = output.prompt_logprobs
    print(json.dumps([at[i].logprob for at, i in zip(found[1:], asked["ids"][1:], strict=True)]))


if __name__ == "__main__":
    _main()
