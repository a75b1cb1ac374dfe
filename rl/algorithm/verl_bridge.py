"""Provides verl's policy losses and rollout corrections with our types. Only this file uses verl (0.9.1).

verl is imported inside the functions, because its import takes ten seconds and most runs do not use it.

How verl differs from our gae.py and losses.py (test_verl_bridge.py tests each point):
- verl's "vanilla" policy loss clips twice if the advantage is negative (dual clip, c = 3). Our default for c is so
  large that the second clip has no effect. With this default, the loss equals losses.clipped_policy_loss. A recipe can
  set c with `clip_ratio_c`.
- verl's GAE always whitens the advantages, with the sample variance (the divisor is the number of tokens minus 1). In
  verl, advantages are not 0 where the mask is False. verl's returns equal ours. verl's advantages equal ours if ours
  are whitened in the same way.
- verl's value loss clips the change of the value. If the clip range is so large that nothing is clipped, the loss
  equals losses.value_loss.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rl.algorithm.losses import MAX_LOG_RATIO, MinibatchSize, Sums, kl_sum

Parameters = Mapping[str, float | str]

_OUT_OF_REACH = 1e9  # no ratio reaches this limit: verl clamps log-ratios to 20, so ratios are at most e^20 = 4.9e8
_CLIP = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")
_SUM = ("loss_agg_mode", "loss_scale_factor")
_AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

# The parameters that each of verl's losses reads. A loss that a user has registered accepts all parameters.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "vanilla": (*_CLIP, "clip_ratio_c", *_SUM),
    "dppo_tv": (*_CLIP, "clip_ratio_c", *_SUM),
    "dppo_kl": (*_CLIP, "clip_ratio_c", *_SUM),
    "gspo": (*_CLIP, *_SUM),
    "sapo": ("tau_pos", "tau_neg"),
    "gpg": _SUM,
    "geo_mean": _CLIP,
    "dro": ("dro_beta", *_SUM),
    "cispo": (*_CLIP, *_SUM),
}
_DEFAULTS: dict[str, Parameters] = {
    "vanilla": {"clip_ratio_c": _OUT_OF_REACH},
    # verl's comments and arXiv:2602.04879 use the value 20. The default in verl's config is 3.
    "dppo_tv": {"clip_ratio_c": 20.0},
    "dppo_kl": {"clip_ratio_c": 20.0},
}
_REFUSED = {
    "clip_cov": "its gradient depends on how a minibatch is split: it drops random tokens from the tokens with a high "
    "covariance within one part of the minibatch",
    "kl_cov": "its gradient depends on how a minibatch is split: it penalises the tokens with the largest covariance "
    "within one part of the minibatch",
    "bypass_mode": "it uses the engine's logprobs as the old policy's logprobs, and computes its own weights; "
    "set ppo.ratio, ppo.tis_cap and ppo.rollout_correction instead",
}


def policy_loss_names() -> list[str]:
    """Returns the names of all policy losses that verl has registered, except the refused ones."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return [name for name in POLICY_LOSS_REGISTRY if name not in _REFUSED]


def policy_loss(name: str, parameters: Parameters | None = None) -> "VerlPolicyLoss":
    """Returns one of verl's registered policy losses as a rl.algorithm.losses.PolicyLoss.

    Args:
        name: the loss's name in verl's registry.
        parameters: the loss's parameters, with verl's names and meanings (clip_ratio, clip_ratio_low, tau_pos,
            dro_beta, ...). clip_ratio sets both clip_ratio_low and clip_ratio_high. Parameters that are not given have
            verl's defaults, except `clip_ratio_c`. For vanilla, the default of `clip_ratio_c` is so large that it has
            no effect. For dppo_*, `clip_ratio_c` is the upper limit of the importance weight, and its default is 20.
    Raises:
        ValueError: verl has no such loss, the loss does not read a given parameter, a parameter is missing, or the
            loss is refused. A loss is also refused if its gradient depends on how a minibatch is split. This function
            checks the gradient with a small example, also for losses that users have registered.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    choose = f"choose one of {', '.join(policy_loss_names())}"
    if name not in POLICY_LOSS_REGISTRY:
        raise ValueError(f"verl has no policy loss {name!r}; {choose}")
    if name in _REFUSED:
        raise ValueError(f"verl's policy loss {name} is refused ({_REFUSED[name]}); {choose}")
    given = dict(parameters or {})
    _check_parameters(name, given)
    compute = POLICY_LOSS_REGISTRY[name]
    loss = VerlPolicyLoss(name, compute, _actor_config(name, given, compute))
    if _depends_on_split(loss):
        raise ValueError(
            f"verl's policy loss {name} with {given} is refused: on an example its gradient depends on how the "
            "minibatch is split; write the loss as a sum over tokens or responses (verl's agg_loss computes it)"
        )
    return loss


@dataclasses.dataclass(frozen=True)
class VerlPolicyLoss:
    """A losses.PolicyLoss that verl computes.

    Some of verl's losses use all tokens of a response together. So every row of the tensors must be a whole response. A
    minibatch may be split between responses, but not inside a response.
    """

    name: str
    compute: Callable[..., tuple[Tensor, dict[str, Any]]]  # the function in verl's registry
    config: Any  # verl's ActorConfig

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        size: MinibatchSize,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Sums]:
        """Returns the loss (scalar) and the sums approx_kl and clip_fraction, as in rl.algorithm.losses. All tensor
        arguments are [n, R]."""
        logprobs, old_logprobs, advantages = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
        if self.name == "geo_mean":  # geo_mean is the only loss whose ratio could overflow
            now = logprobs.detach()
            old_logprobs = now - (now - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        loss, metrics = self.compute(
            old_logprobs,
            logprobs,
            advantages,
            mask.to(logprobs.dtype),
            self.config.loss_agg_mode,
            dataclasses.replace(self.config, global_batch_info=self._global_batch_info(size)),
            None if weights is None else torch.where(mask, weights, 0.0),
        )
        if self.name == "geo_mean":  # verl divides by the number of rows of this call and ignores global_batch_info
            loss = loss * (len(mask) / size.responses)
        clipped = metrics.get("actor/pg_clipfrac", 0.0) * mask.sum()
        return loss, {"approx_kl": kl_sum(logprobs, old_logprobs, mask), "clip_fraction": clipped.to(loss.dtype)}

    def _global_batch_info(self, size: MinibatchSize) -> dict[str, Any]:
        return {
            "dp_size": 1,  # the learner adds the gradients of the ranks, as with our own losses
            "batch_num_tokens": size.tokens,
            "global_batch_size": size.responses,
            "loss_scale_factor": self.config.loss_scale_factor,
        }


def _check_parameters(name: str, given: Parameters) -> None:
    known = _PARAMETERS.get(name) or tuple(dict.fromkeys(key for keys in _PARAMETERS.values() for key in keys))
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"verl's policy loss {name} has no parameter {key}; {hint}")
        if key == "loss_agg_mode" and value not in _AGGREGATIONS:
            raise ValueError(f"loss_agg_mode is {value!r}; choose one of {', '.join(_AGGREGATIONS)}")
        if key != "loss_agg_mode" and not isinstance(value, int | float):
            raise ValueError(f"{key} of verl's policy loss {name} is {value!r}; give a number")
    if given.get("loss_agg_mode") == "seq-mean-token-sum-norm" and "loss_scale_factor" not in given:
        raise ValueError("loss_agg_mode seq-mean-token-sum-norm needs loss_scale_factor, the number to divide by")


def _actor_config(name: str, given: Parameters, compute: Callable[..., Any]) -> Any:
    """Returns verl's ActorConfig, with the given parameters in the fields that verl's losses read."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    values = {"loss_agg_mode": _default_aggregation(compute), **_DEFAULTS.get(name, {}), **given}
    if "clip_ratio" in values:  # verl reads clip_ratio only if clip_ratio_low and _high are None
        values = {"clip_ratio_low": values["clip_ratio"], "clip_ratio_high": values["clip_ratio"], **values}
    loss = PolicyLossConfig(loss_mode=name, **_fields_of(PolicyLossConfig, values))
    return ActorConfig(
        strategy="none", rollout_n=1, use_dynamic_bsz=True, policy_loss=loss, **_fields_of(ActorConfig, values)
    )


def _default_aggregation(compute: Callable[..., Any]) -> str:
    """Returns the default of loss_agg_mode in the loss's signature: a mean over tokens or, for GSPO, over responses."""
    parameter = inspect.signature(compute).parameters.get("loss_agg_mode")
    return parameter.default if parameter and isinstance(parameter.default, str) else "token-mean"


def _fields_of(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)}
    return {key: value for key, value in values.items() if key in names}


def _depends_on_split(loss: VerlPolicyLoss) -> bool:
    """Computes the gradient for six example responses, once for the whole minibatch and once in two parts. Returns True
    if the two gradients differ."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 2, 12, 9, 7])
    mask = torch.arange(12) < lengths[:, None]
    logprobs, noise, advantages = torch.randn(3, 6, 12, generator=generator, dtype=torch.float64).unbind()
    logprobs = (-logprobs.abs()).requires_grad_()
    old = (logprobs - 0.3 * noise).detach()
    size = MinibatchSize(tokens=int(lengths.sum()), responses=6)

    def gradient(*parts: slice) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            width = slice(0, int(lengths[part].max()))
            piece = (x[part, width] for x in (logprobs, old, 3 * advantages, mask))
            total = total + loss(*piece, size=size)[0]
        return torch.autograd.grad(total, logprobs)[0]

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        whole, split = gradient(slice(0, 6)), gradient(slice(0, 3), slice(3, 6))
    return not torch.allclose(whole, split, rtol=1e-5, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class RolloutCorrection:
    """verl's correction of the difference between the engine that sampled the tokens and the policy that learns."""

    weights: Tensor | None  # [N, R] for a PolicyLoss, 0 where the given mask is False; None if rollout_is is None
    mask: Tensor  # [N, R] bool, the mask for the policy loss: the given mask without the rejected tokens
    sums: Sums  # tis_mean and tis_capped_fraction over `mask`, as in losses.tis_weights


@torch.no_grad()
def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    rollout_is: Literal["token", "sequence"] | None = None,
    rollout_is_threshold: float | str = 2.0,
    rollout_rs: str | None = None,
    rollout_rs_threshold: float | str | None = None,
) -> RolloutCorrection:
    """Computes verl's importance weights (pi_old / pi_rollout) and verl's rejection mask.

    Call this function once per minibatch, with the whole minibatch. The weights and the rejections of a response do not
    depend on the other responses of the minibatch.

    Args:
        old_logprobs: [N, R] nats, of the learner before the update.
        rollout_logprobs: [N, R] nats, computed by the engine during sampling.
        mask: [N, R] bool. Every row is a whole response.
        rollout_is: "token" gives one weight per token. "sequence" gives one weight per response: the product of the
            ratios of its tokens.
        rollout_is_threshold: a number is the maximum of the weights (truncated importance sampling). A text such as
            "0.5_2" gives a range (here from 0.5 to 2), and weights outside of this range become 0 (IcePop). The
            threshold is used only if rollout_is is given.
        rollout_rs: comma-separated criteria by which tokens (token_k1, ...) or responses (seq_mean_k1, ...) are
            rejected.
        rollout_rs_threshold: one threshold for all criteria, or comma-separated thresholds, one per criterion. The
            threshold of a k1 criterion is a range of ratios. The range is written as a text such as "0.5_2".
    Raises:
        ValueError: no token is chosen, verl has no such criterion, or a threshold is missing or has a wrong format.
    Source: verl.trainer.ppo.rollout_corr_helper, whose docstrings explain every criterion.
    """
    if not mask.any():
        raise ValueError("no token to correct: mask is False everywhere; leave such a minibatch out")
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    proto, kept, metrics = compute_rollout_correction_and_rejection_mask(
        old_log_prob=torch.where(mask, old_logprobs, 0.0),
        rollout_log_prob=torch.where(mask, rollout_logprobs, 0.0),
        response_mask=mask.to(old_logprobs.dtype),
        rollout_is=rollout_is,
        rollout_is_threshold=rollout_is_threshold,
        rollout_rs=rollout_rs,
        rollout_rs_threshold=rollout_rs_threshold,
    )
    kept = kept.bool()
    weights: Any = None if proto is None else proto.batch["rollout_is_weights"]
    high = metrics.get("rollout_corr/rollout_is_ratio_fraction_high", 0.0)
    sums = {
        "tis_mean": kept.sum() * 1.0 if weights is None else torch.where(kept, weights, 0.0).sum(),
        "tis_capped_fraction": kept.sum() * high,
    }
    return RolloutCorrection(weights, kept, sums)
