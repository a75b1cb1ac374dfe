"""AdamW with linear warm-up and gradient clipping. The whole state consists of named tensors and the number of
steps."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rl.config import PPO

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Updates the trained parameters of one model.

    Args:
        parameters: name -> parameter.
        ppo: the options of AdamW, `max_grad_norm` and `max_skipped_steps`. A step is skipped if its gradient is not
            finite. If `max_skipped_steps` steps in a row are skipped, `step` raises an error.
        lr: the constant learning rate after the warm-up.
        warmup: the number of steps over which the learning rate rises linearly from 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ppo: PPO, *, lr: float, warmup: int) -> None:
        self.parameters, self.ppo, self.lr, self.warmup = dict(parameters), ppo, lr, warmup
        self.steps, self.skipped = 0, 0  # number of steps that were made; number of steps in a row that were skipped
        self.adamw = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=ppo.betas, weight_decay=ppo.weight_decay, eps=1e-8, fused=True
        )

    @property
    def next_lr(self) -> float:
        """The learning rate of the next step."""
        return self.lr * min(1.0, (self.steps + 1) / self.warmup) if self.warmup else self.lr

    def step(self) -> float | None:
        """Applies the accumulated gradients and clears them.

        Returns: the norm of the gradients before clipping, or None if the norm is not finite and the step was skipped.
        Raises: FloatingPointError if `ppo.max_skipped_steps` steps in a row were skipped.
        """
        total = nn.utils.clip_grad_norm_(self.parameters.values(), self.ppo.max_grad_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if not math.isfinite(norm):
            self.adamw.zero_grad(set_to_none=True)
            self.skipped += 1
            if self.skipped >= self.ppo.max_skipped_steps:
                raise FloatingPointError(
                    f"the gradient norm is {norm} at optimizer step {self.steps + 1}; skipped steps in a row: "
                    f"{self.skipped} (the maximum, set by ppo.max_skipped_steps)"
                )
            return None
        self.skipped = 0
        for group in self.adamw.param_groups:
            group["lr"] = self.next_lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return norm

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors `<parameter>.exp_avg` and `<parameter>.exp_avg_sq` of every parameter. Returns {} before
        the first step."""
        return {
            f"{name}.{moment}": self.adamw.state[parameter][moment]
            for name, parameter in self.parameters.items()
            for moment in MOMENTS
            if parameter in self.adamw.state
        }

    def continue_after(self, steps: int) -> None:
        """Sets the number of steps made. The caller must then write the saved moments into the tensors that `state`
        returns."""
        self.steps = steps
        if not steps:
            return
        for parameter in self.parameters.values():
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            self.adamw.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}
