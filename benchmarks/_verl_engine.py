"""Runs a training step in the engine of verl 0.9.1; benchmarks.learner compares this engine with our learner.

`FSDPEngineWithLMHead` is the class that verl's trainers run. Here it runs with FSDP2 in one process on the CPU.
The import of this file takes several seconds. These are the fastest settings that work on a CPU:
- Everything is computed in float32, because our side uses float32 too. verl's default is bfloat16.
- Gradient checkpointing is off, because it would compute every layer a second time. The entropy is not computed, and
  nothing is offloaded. torch.compile is off, because verl uses it only for the entropy. After the forward pass, FSDP2
  keeps the unsharded weights for the backward pass, because this avoids copies.
- Attention is computed by transformers' SDPA. Without a GPU, there is no flash attention, and FlexAttention has no
  backward pass. In a packed row, a mask separates the rollouts. SDPA also computes the token pairs that the mask
  discards, so one long row is slower than several short rows. `VerlEngine.tune` finds the fastest micro-batch size for
  a batch.
- Flash attention has a kernel for logprobs. Without this kernel, verl loops over the tokens in Python, and this takes a
  tenth of the time of a step. This file replaces the loop with verl's `logprobs_from_logits_naive`, and replaces
  nothing else in verl. verl's fused head is not used: the head of our model does not share its weight with the
  embedding, and FSDP2 has already sharded the head's weight when the fused head needs it.
- The loss is verl's `ppo_loss` with the policy loss "gpg", which is the plain policy gradient.

This file itself has no test; the benchmark compares verl's logprobs and gradients with ours. The registration of the
benchmark is tested in tests/benchmarks/test_harness.py.
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

ROWS = (2, 4, 8)  # `tune` tries micro-batches with 2, 4 and 8 times the tokens of the longest rollout
SLOWER = 1.2  # if a step takes longer than this factor times the best time, `tune` tries no larger micro-batch


class CpuPlatform(PlatformCUDA):
    """Lets verl use the CPU as its device. The engine calls only the methods that are defined here."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return torch.cpu

    def current_device(self) -> Any:
        """Returns the name of the device that verl moves tensors to. If the method returned a number, such as 0, torch
        would use an accelerator."""
        return "cpu"


@dataclass(frozen=True)
class Split:
    """The way in which verl splits a batch into micro-batches. A micro-batch is one forward and backward pass."""

    tokens: int | None  # maximum tokens per micro-batch, not counting padding; None: one rollout per micro-batch
    padded: bool = False  # True: one padded row per rollout; False: one packed row per micro-batch

    def __str__(self) -> str:
        if self.tokens is None:
            return "one rollout"
        return f"{'padded' if self.padded else 'packed'}, {self.tokens} tokens"

    def settings(self) -> dict[str, Any]:
        """Returns verl's options for this split."""
        if self.tokens is None:
            size = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
        else:
            size = {"use_dynamic_bsz": True, "max_token_len_per_gpu": self.tokens}
        return {"use_remove_padding": not self.padded, **size}


@dataclass(frozen=True)
class VerlBatch:
    """A batch of rollouts. `data` has the form that verl's trainers pass to the engine."""

    data: TensorDict
    responses: tuple[int, ...]  # tokens of each response
    longest: int  # tokens of the longest rollout, prompt included


def verl_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], advantages: Sequence[Sequence[float]]
) -> VerlBatch:
    """Makes a batch. Row i is prompts[i] + responses[i]; advantages[i] has one value for each response token."""
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
            # verl requires this field but does not read it.
            "old_log_probs": nested([torch.zeros(len(response)) for response in responses]),
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
    """Returns rows of different lengths as one jagged tensor, which is verl's form of a batch without padding."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def whole_logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Replaces verl's `logprobs_from_logits`. Computes the logprobs of all tokens at once, which needs a copy of the
    logits."""
    return logprobs_from_logits_naive(logits, labels)


class VerlEngine:
    """Runs forward and backward passes of a policy in verl's FSDP2 engine on one CPU rank, without optimizer steps.

    The constructor initializes torch.distributed if necessary, with this process as the only member.

    Args:
        folder: folder of a Hugging Face causal language model. The engine computes in float32.
        token_budget: maximum tokens of one micro-batch. Before `tune` is called, verl makes as few micro-batches as
            this limit allows.
    """

    def __init__(self, folder: Path, token_budget: int) -> None:
        set_platform(CpuPlatform())  # must run before the next import, because this import reads the platform
        with warnings.catch_warnings(action="ignore"):  # verl warns about every engine that is not installed
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
        """Clears the gradients, then runs the forward and backward passes of the whole batch.

        The loss is -sum(advantage * logprob) / number of response tokens.
        Returns: the logprobs of the response tokens, one tensor per row.
        """
        assign_non_tensor(batch.data, **self.split.settings())
        with self._engine.train_mode(zero_grad_on_exit=False):
            self._engine.optimizer_zero_grad()
            output: Any = self._engine.forward_backward_batch(batch.data, self._loss)
        rows = output["model_output"]["log_probs"].unbind()  # entry t is the logprob of token t + 1
        return [row[-1 - length : -1].detach() for row, length in zip(rows, batch.responses, strict=True)]

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients of the last step: a mapping from the parameters' names in the checkpoint to the
        gradients."""
        return {
            name: parameter.grad.full_tensor()
            for name, parameter in self._engine.module.named_parameters()
            if parameter.grad is not None
        }

    def tune(self, batch: VerlBatch) -> None:
        """Measures several splits on this batch and selects the fastest. A split gives each micro-batch one rollout,
        several packed rollouts, or several padded rollouts."""

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
