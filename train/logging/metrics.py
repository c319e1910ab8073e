"""All keys of metrics.jsonl, made from the numbers of a logged step. docs/telemetry.md has a table of them.

L layers that route, E experts, G router metrics, P peaks. The keys are the same for any number of layers and experts: each value
summarizes all of them. Only tier detailed adds keys for each layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...moe.config import BALANCE_COEFFICIENTS, ModelConfig, MoEConfig
from ...moe.param_count import training_flops_per_token
from ...moe.router_metrics import SUMS
from ..step import StepNumbers


class Meter:
    """Makes the records of metrics.jsonl. Its only state is the number of tokens trained on, which checkpoints keep.

    `peak_flops`: FLOP/s of all devices of the run together (peak_flops.py). `tokens`: those of a resumed run so far.
    """

    def __init__(self, model: ModelConfig, sequence_length: int, peak_flops: float, tokens: int = 0):
        self.model = model
        self.tokens = tokens
        self.peak_flops = peak_flops
        self.flops_per_token = training_flops_per_token(model, sequence_length)
        self.layers = routing_layers(model)

    def record(self, step: int, numbers: StepNumbers, lr: float, tokens: int, seconds: float) -> dict[str, Any]:
        """Returns the record of a logged step, whose `numbers` are on the host.

        `tokens` and `seconds` are those of training since the last logged step. `loss` is the mean cross entropy per valid token in
        nats; the other losses are means over the layers or modules, without their coefficients; `grad_norm` is the norm before
        clipping. `mfu` is model FLOPs per second over the peak: 3 x forward, active experts only, whether or not activations are
        recomputed. Attention counts as causal over the whole sequence, so with data.mask_documents `mfu` is too high.
        """
        self.tokens += tokens
        tokens_per_second, layers = tokens / seconds, len(numbers.balance_L)
        losses = {
            "balance": numbers.balance_L,
            "balance_sequence": numbers.sequence_L,
            "balance_device": numbers.device_L,
            "balance_communication": numbers.communication_L,
            "importance": numbers.importance_L,
            "z": numbers.z_L,
        }
        means = {kind: loss_L.sum().item() / max(1, layers) for kind, loss_L in losses.items()}
        if self.model.moe.balance.pool_layers:
            means["balance"] = numbers.balance_L.sum().item()  # one loss of all layers
        return {
            "step": step,
            "tokens": self.tokens,
            "loss": numbers.cross_entropy.item(),
            "loss_balance": means["balance"],
            "loss_z": means["z"],
            **({"loss_mtp": numbers.mtp_D.mean().item()} if len(numbers.mtp_D) else {}),
            **auxiliary_metrics(self.model.moe, means, layers, step),
            **null_expert_metrics(self.model, numbers.counts_LE),
            "grad_norm": numbers.gradient_norm.item(),
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops,
            **load_metrics(numbers.counts_LE[:, : self.model.moe.experts], numbers.dropped_L, self.layers),
            **({"moe/overflow_rows": numbers.overflow_L.sum().item()} if len(numbers.overflow_L) else {}),
            **qk_clip_metrics(numbers),
        }


def auxiliary_metrics(config: MoEConfig, means: dict[str, float], layers: int, step: int) -> dict[str, float]:
    """Returns what each routing loss adds to the objective at `step`, and the capacity factor in force (0: dropless).

    `means`: the losses without coefficients, as means over the `layers` layers that route; a pooled one is of all of them.
    """
    kinds = ("balance", "balance_sequence", "balance_device", "balance_communication", "importance", "z")
    declared, in_force = (
        [*(getattr(each.balance, name) for name in BALANCE_COEFFICIENTS), each.z_coefficient] for each in (config, config.at(step))
    )
    record = {}
    for kind, coefficient, now in zip(kinds, declared, in_force, strict=True):
        if coefficient and layers:
            terms = 1 if kind == "balance" and config.balance.pool_layers else layers
            record |= {f"loss_{kind}": means[kind], f"loss_{kind}_scaled": now * means[kind] * terms}
    if layers and (config.capacity.factor is not None or config.capacity.schedule):
        record["moe/capacity_factor"] = config.capacity.factor_at(step) or 0.0
    return record


def null_expert_metrics(model: ModelConfig, counts_LE: Tensor) -> dict[str, float]:
    """Returns `moe/null_fraction`, the share of all choices that fell on null experts: the last columns of `counts_LE`."""
    if not (model.moe.router.null_experts and counts_LE.numel()):
        return {}
    null, total = counts_LE[:, model.moe.experts :].sum().item(), counts_LE.sum().item()
    return {"moe/null_fraction": null / max(1, total)}


def qk_clip_metrics(numbers: StepNumbers) -> dict[str, float]:
    """Returns the largest attention logit of the step and how many heads were clipped by it, with optimizer.qk_clip."""
    names = "stability/attention_logit_max", "stability/clipped_heads"
    return dict(zip(names, numbers.qk_clip_2.tolist(), strict=False))


def routing_layers(model: ModelConfig) -> list[int]:
    """Returns the indices of the blocks that route in training; blocks of multi-token prediction follow the model's own."""
    return [index for index in range(model.layers + model.mtp_depth) if model.moe_layer(index)]


def load_metrics(
    counts_LE: Tensor | Sequence[Sequence[int]], dropped_L: Tensor | Sequence[int], layers: Sequence[int]
) -> dict[str, Any]:
    """Returns how evenly the experts are loaded, and the share of choices that were dropped.

    `moe/load_max_over_mean` is the busiest expert's tokens over an even share, in the worst layer (named by `..._layer`), and
    `..._mean` its mean over layers; `moe/dead_experts` got no token at all. A dense model has only `dropped_fraction`, which is 0.

    `layers`: the block index of each row of `counts_LE`.
    """
    rows: list[list[int]] = counts_LE.tolist() if isinstance(counts_LE, Tensor) else [list(counts_E) for counts_E in counts_LE]
    dropped: list[int] = dropped_L.tolist() if isinstance(dropped_L, Tensor) else list(dropped_L)
    if not rows:
        return {"dropped_fraction": 0.0}
    routed = sum(map(sum, rows))
    peaks = [max_over_mean(row) for row in rows]
    worst = peaks.index(max(peaks))
    return {
        "dropped_fraction": sum(dropped) / routed if routed else 0.0,
        "moe/load_max_over_mean": peaks[worst],
        "moe/load_max_over_mean_layer": layers[worst],
        "moe/load_max_over_mean_mean": sum(peaks) / len(peaks),
        "moe/load_min_over_mean": min(min_over_mean(row) for row in rows),
        "moe/dead_experts": sum(row.count(0) for row in rows),
    }


def max_over_mean(counts_E: Sequence[int]) -> float:
    """Returns the busiest expert's tokens over an even share: 1 if all are equal, E if one takes all, 0 if nothing was routed."""
    total = sum(counts_E)
    return max(counts_E) * len(counts_E) / total if total else 0.0


def min_over_mean(counts_E: Sequence[int]) -> float:
    """Returns the least used expert's tokens over an even share: 1 if all are equal, 0 if an expert is dead."""
    total = sum(counts_E)
    return min(counts_E) * len(counts_E) / total if total else 0.0


# The `moe/...` keys of the expert statistics: for each number the worst layer, which one it is, and the mean over layers.


class Loads(NamedTuple):
    """How evenly the experts of each layer are loaded, from the counts alone."""

    max_over_mean_L: Tensor
    variation_L: Tensor
    """Standard deviation over mean (Shazeer et al. 2017, eq. 6-7 before squaring)."""
    entropy_L: Tensor
    """Entropy of the load over ln E: 1 for an even load, 0 where one expert takes all."""


def loads(counts_LE: Tensor) -> Loads:
    """Returns the loads of each layer; a layer without any token has 0, 0 and 1."""
    experts = counts_LE.shape[1]
    total_L1 = counts_LE.sum(1, keepdim=True)
    share_LE = torch.where(total_L1 > 0, counts_LE.double() / total_L1.clamp(min=1), 1 / experts)
    entropy_L = torch.special.entr(share_LE).sum(1) / math.log(experts) if experts > 1 else torch.ones(len(counts_LE)).double()
    variation_L = (experts * share_LE).std(1, correction=0)
    return Loads(torch.where(total_L1 > 0, experts * share_LE, 0.0).amax(1), variation_L, entropy_L)


def brief_metrics(numbers: StepNumbers, tensors: Mapping[str, Tensor], model: ModelConfig, ranks: int) -> dict[str, float]:
    """Returns at most 21 keys in addition to those of `load_metrics`; a dense model has none.

    `tensors`: those of a Snapshot. A rank's overload is its rows over the mean of all ranks. At each exchange all ranks wait
    for the busiest one, so the time of a step follows the sum over layers of the busiest rank's rows: the skew is that sum over
    the sum of the means.
    """
    counts_LE, layers = numbers.counts_LE[:, : model.moe.experts], routing_layers(model)
    if not counts_LE.numel():
        return {}
    load = loads(counts_LE)
    record = {
        **_worst("moe/load_cv", load.variation_L, layers),
        **_worst("moe/load_entropy", load.entropy_L, layers, least=True),
        "moe/dead_fraction": tensors["dead_LE"].sum().item() / counts_LE.numel(),
        **_worst("moe/dropped_fraction", numbers.dropped_L / counts_LE.sum(1).clamp(min=1), layers),
    }
    del record["moe/dropped_fraction_mean"]  # close to dropped_fraction, which is of all layers together
    metrics_LG = numbers.router_metrics_LG
    if metrics_LG.numel():
        logit_max_L, busiest_L = tensors["peaks_LP"].unbind(1)
        mean_L = metrics_LG[:, SUMS.index("rows")] / ranks
        record |= {
            **_worst("moe/router_entropy", per_token(metrics_LG, "entropy"), layers, least=True),
            "moe/top1_probability": per_token(metrics_LG, "top1").mean().item(),
            "moe/router_logit_norm": per_token(metrics_LG, "logit_norm").mean().item(),
            "moe/router_logit_max": logit_max_L.max().item(),
            "moe/rank_overload": torch.where(mean_L > 0, busiest_L / mean_L.clamp(min=1e-9), 1.0).max().item(),
            "moe/exchange_skew": (busiest_L.sum() / mean_L.sum()).item() if mean_L.sum() > 0 else 1.0,
        }
    if "bias_LE" in tensors:
        record["moe/expert_bias_range"] = (tensors["bias_LE"].amax(1) - tensors["bias_LE"].amin(1)).max().item()
    return record


def layer_metrics(numbers: StepNumbers, model: ModelConfig) -> dict[str, float]:
    """Returns the four keys for each layer that tier detailed adds."""
    counts_LE = numbers.counts_LE[:, : model.moe.experts]
    if not counts_LE.numel():
        return {}
    load, record = loads(counts_LE), {}
    values = {"load_max_over_mean": load.max_over_mean_L, "load_entropy": load.entropy_L, "dropped": numbers.dropped_L}
    if numbers.router_metrics_LG.numel():
        values["router_entropy"] = per_token(numbers.router_metrics_LG, "entropy")
    for name, values_L in values.items():
        layers = zip(routing_layers(model), values_L.tolist(), strict=True)
        record |= {f"moe/{name}/layer_{layer}": value for layer, value in layers}
    return record


def per_token(router_metrics_LG: Tensor, name: str) -> Tensor:
    """Returns a router metric divided by the tokens, (L,)."""
    return router_metrics_LG[:, SUMS.index(name)] / router_metrics_LG[:, SUMS.index("tokens")].clamp(min=1)


def _worst(name: str, values_L: Tensor, layers: Sequence[int], least: bool = False) -> dict[str, float]:
    """Returns the largest value (or the `least`), the first layer that has it, and the mean over layers."""
    at = int(values_L.argmin() if least else values_L.argmax())
    return {name: values_L[at].item(), f"{name}_layer": layers[at], f"{name}_mean": values_L.double().mean().item()}
