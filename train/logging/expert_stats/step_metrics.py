"""The `moe/...` keys of a record of metrics.jsonl: for each number the worst layer, which one it is, and the mean over layers.

L layers that route, E experts, G router metrics, P peaks. The keys are the same for any number of layers or experts (tier brief).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....moe.config import ModelConfig
from ....moe.router import SUMS
from ...step import StepNumbers
from ..metrics import routing_layers


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


def brief_metrics(numbers: StepNumbers, extra: Mapping[str, Tensor], model: ModelConfig, ranks: int) -> dict[str, float]:
    """Returns at most 21 keys in addition to those of `metrics.load_metrics`; a dense model has none.

    `extra`: the tensors of a Snapshot. A rank's overload is its rows over the mean of all ranks. At each exchange all ranks wait
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
        "moe/dead_fraction": extra["dead_LE"].sum().item() / counts_LE.numel(),
        **_worst("moe/dropped_fraction", numbers.dropped_L / counts_LE.sum(1).clamp(min=1), layers),
    }
    del record["moe/dropped_fraction_mean"]  # close to dropped_fraction, which is of all layers together
    metrics_LG = numbers.router_metrics_LG
    if metrics_LG.numel():
        logit_max_L, busiest_L = extra["peaks_LP"].unbind(1)
        mean_L = metrics_LG[:, SUMS.index("rows")] / ranks
        record |= {
            **_worst("moe/router_entropy", per_token(metrics_LG, "entropy"), layers, least=True),
            "moe/top1_probability": per_token(metrics_LG, "top1").mean().item(),
            "moe/router_logit_norm": per_token(metrics_LG, "logit_norm").mean().item(),
            "moe/router_logit_max": logit_max_L.max().item(),
            "moe/rank_overload": torch.where(mean_L > 0, busiest_L / mean_L.clamp(min=1e-9), 1.0).max().item(),
            "moe/exchange_skew": (busiest_L.sum() / mean_L.sum()).item() if mean_L.sum() > 0 else 1.0,
        }
    if "bias_LE" in extra:
        record["moe/expert_bias_range"] = (extra["bias_LE"].amax(1) - extra["bias_LE"].amin(1)).max().item()
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
