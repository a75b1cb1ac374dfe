"""The other side of the learner's benchmarks: a step in verl 0.9.1's training engine. Importing it takes seconds.

`FSDPEngineWithLMHead` is the class that verl's trainers run, here with FSDP2 in one process on the CPU. Its settings
are the fastest ones:
- float32 everywhere, as on our side. verl's default is bfloat16.
- No gradient checkpointing (it recomputes every layer), no entropy, no offloading. Weights are not resharded between
  forward and backward, which saves copies. verl's torch.compile is for the entropy, so it is off.
- transformers' SDPA: without a GPU there is no flash attention, and FlexAttention has no backward. A mask separates
  the rollouts of a packed row, but SDPA also computes the masked pairs, so a long row is slower than several short
  ones. `VerlEngine.tune` finds the fastest size for a batch.
- Without flash attention's kernel for logprobs, verl loops over the tokens in Python, which takes a tenth of a step.
  `logprobs_from_logits_naive` of verl replaces that loop; nothing else is replaced. verl's fused head does not work
  here: FSDP2 has sharded the head when it is called, unless it is tied to the embedding.
- verl's `ppo_loss` with its loss "gpg", the plain policy gradient.

Not tested: the benchmark compares its logprobs and gradients with ours. Its registration is tested in
tests/benchmarks/test_harness.py.
"""

import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, distributed
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.utils.tensordict_utils import assign_non_tensor
from verl.utils.torch_functional import logprobs_from_logits_naive

ROWS = (2, 4, 8)  # sizes of micro-batches that `tune` tries, in longest rollouts
SLOWER = 1.2  # `tune` tries no larger size if one is slower than the best by this factor


class CpuPlatform(PlatformCUDA):
    """Adds the CPU to verl's devices. The engine calls no other method."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return torch.cpu

    def current_device(self) -> Any:
        """Returns the device that verl moves tensors to. A number would mean an accelerator."""
        return "cpu"


@dataclass(frozen=True)
class Split:
    """How verl splits a batch into micro-batches, one forward and backward pass each."""

    tokens: int | None  # most tokens without padding; None: one rollout
    padded: bool = False  # a row per rollout instead of one packed row

    def __str__(self) -> str:
        if self.tokens is None:
            return "one rollout"
        return f"{'padded' if self.padded else 'packed'}, {self.tokens} tokens"

    def settings(self) -> dict[str, Any]:
        """Returns the split as verl's options."""
        if self.tokens is None:
            size = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
        else:
            size = {"use_dynamic_bsz": True, "max_token_len_per_gpu": self.tokens}
        return {"use_remove_padding": not self.padded, **size}


@dataclass(frozen=True)
class VerlBatch:
    """Rollouts in the form that verl's trainers give to the engine, and their lengths in tokens."""

    data: TensorDict
    responses: tuple[int, ...]
    longest: int  # prompt and response


def verl_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], advantages: Sequence[Sequence[float]]
) -> VerlBatch:
    """Makes a batch whose row i is prompts[i] + responses[i], with an advantage for every response token."""
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
    ones = nested([torch.ones(len(response), dtype=torch.int64) for response in responses])
    data = TensorDict(
        {
            "input_ids": nested(rows),
            "position_ids": nested([torch.arange(len(row)) for row in rows]),
            "prompts": nested([torch.tensor(prompt) for prompt in prompts]),
            "responses": nested([torch.tensor(response) for response in responses]),
            "response_mask": ones,
            "loss_mask": ones,
            "advantages": nested([torch.tensor(row, dtype=torch.float32) for row in advantages]),
            "old_log_probs": nested([torch.zeros(len(response)) for response in responses]),  # required, but not read
        },
        batch_size=[len(rows)],
    )
    assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=False,
        global_batch_size=len(rows),
        use_fused_kernels=False,
        return_model_output=True,
    )
    return VerlBatch(data, tuple(map(len, responses)), max(map(len, rows)))


def nested(rows: Sequence[Tensor]) -> Tensor:
    """Returns rows of different lengths as one jagged tensor, verl's form of a batch without padding."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def whole_logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Replaces verl's `logprobs_from_logits`: all tokens at once, for which it copies the logits."""
    return logprobs_from_logits_naive(logits, labels)


class VerlEngine:
    """Forward and backward of a policy, without optimizer steps, in verl's FSDP2 engine on one CPU rank.

    Starts torch.distributed for this process alone, unless it runs already.

    Args:
        folder: a Hugging Face causal language model; computed in float32.
        token_budget: most tokens in one micro-batch. Without `tune`, verl makes as few micro-batches as it can.
    """

    def __init__(self, folder: Path, token_budget: int) -> None:
        set_platform(CpuPlatform())  # before the import of the engine, which reads it
        with warnings.catch_warnings(action="ignore"):  # a warning for every engine that is not installed
            from verl.workers.engine.fsdp import FSDPEngineWithLMHead, transformer_impl
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import (
            ActorConfig,
            FSDPEngineConfig,
            FSDPOptimizerConfig,
            HFModelConfig,
            PolicyLossConfig,
        )
        from verl.workers.utils.losses import ppo_loss

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        transformer_impl.logprobs_from_logits = whole_logprobs
        self.token_budget = token_budget
        self.split = Split(token_budget)
        self._loss = partial(
            ppo_loss,
            ActorConfig(
                strategy="fsdp2",
                rollout_n=1,
                use_dynamic_bsz=True,
                policy_loss=PolicyLossConfig(loss_mode="gpg"),
                loss_agg_mode="token-mean",
            ),
        )
        with redirect_stdout(sys.stderr):  # verl prints to standard output
            self._engine = FSDPEngineWithLMHead(
                HFModelConfig(
                    path=str(folder),
                    load_tokenizer=False,
                    override_config={"attn_implementation": "sdpa"},
                    enable_gradient_checkpointing=False,
                ),
                FSDPEngineConfig(
                    strategy="fsdp2",
                    model_dtype="fp32",
                    mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                    reshard_after_forward=False,
                    use_torch_compile=False,
                ),
                FSDPOptimizerConfig(total_training_steps=1),
                CheckpointConfig(),
            )
            self._engine.initialize()

    def step(self, batch: VerlBatch) -> list[Tensor]:
        """Clears the gradients, then runs forward and backward over the whole batch with the loss
        -sum(advantage * logprob) / response tokens. Returns the logprobs of the response tokens, per row."""
        assign_non_tensor(batch.data, **self.split.settings())
        with self._engine.train_mode(zero_grad_on_exit=False):
            self._engine.optimizer_zero_grad()
            output: Any = self._engine.forward_backward_batch(batch.data, self._loss)
        rows = output["model_output"]["log_probs"].unbind()  # entry t is the logprob of token t + 1
        return [row[-1 - length : -1].detach() for row, length in zip(rows, batch.responses, strict=True)]

    def gradients(self) -> dict[str, Tensor]:
        """Returns the last step's gradients by the parameters' names on disk."""
        return {
            name: parameter.grad.full_tensor()
            for name, parameter in self._engine.module.named_parameters()
            if parameter.grad is not None
        }

    def tune(self, batch: VerlBatch) -> None:
        """Selects the fastest split for this batch: one rollout, or several, packed or padded."""

        def measure(split: Split) -> float:
            self.split = split
            took[split] = min(self._seconds(batch) for _ in range(2))
            return took[split]

        took: dict[Split, float] = {}
        one = measure(Split(None))
        for padded in (False, True):
            best = one
            for tokens in sorted({min(rows * batch.longest, self.token_budget) for rows in ROWS}):
                seconds = measure(Split(tokens, padded))
                if seconds > SLOWER * best:
                    break
                best = min(best, seconds)
        self.split = min(took, key=took.__getitem__)

    def _seconds(self, batch: VerlBatch) -> float:
        start = time.perf_counter()
        self.step(batch)
        return time.perf_counter() - start
