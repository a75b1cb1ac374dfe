"""Runs transformers 4.57, the version that the model card of STEP3-VL-10B names, in a process of its own.

As a program: reads a JSON object {"folder", "ids", "decoder"} from standard input and prints the logprobs of the tokens
`ids`. If `decoder` is true, the folder is a vision-language model, and only its decoder is loaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

VERSIONS = ("transformers==4.57.3", "huggingface_hub==0.36.0")


def install(folder: Path) -> None:
    """Installs transformers 4.57 into a folder, without its dependencies, which this environment has."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *VERSIONS]
    subprocess.run(command, check=True)


def logprobs_of(installed: Path, model: Path, ids: list[int], *, decoder: bool) -> list[float]:
    """Returns the logprob of each token except the first, computed by transformers 4.57 in float32."""
    asked = json.dumps({"folder": str(model), "ids": ids, "decoder": decoder})
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__], input=asked, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    assert transformers.__version__.startswith("4.57"), transformers.__version__
    asked = json.load(sys.stdin)
    if asked["decoder"]:
        text = json.loads(Path(asked["folder"], "config.json").read_text())["text_config"]
        model = Qwen3ForCausalLM(Qwen3Config(**text)).float()
        tensors = load_file(Path(asked["folder"], "model.safetensors"))
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    else:
        model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32)
    ids = torch.tensor([asked["ids"]])
    with torch.no_grad():
        table = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    print(json.dumps(table.gather(1, ids[0, 1:, None])[:, 0].tolist()))


if __name__ == "__main__":
    _main()
