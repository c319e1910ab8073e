"""The `moe/...` keys of a record of metrics.jsonl: for each number the worst layer, which one it is, and the mean over layers.

L layers that route, E experts, G router metrics, P peaks. The keys are the same for any number of layers or experts (tier brief).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....moe.router import SUMS


class Step(NamedTuple):
    """What one step did, over all ranks, on the host."""

    layers: Sequence[int]
    """The block index of each row."""
    counts_LE: Tensor
    """int64: choices of each expert before any is dropped, without null experts."""
    dropped_L: Tensor
    router_metrics_LG: Tensor
    peaks_LP: Tensor
    """Of the rank where it is largest: absolute router logit, and rows computed."""
    ranks: int
    dead: int
    """Experts without a token for the whole window."""
    bias_LE: Tensor | None = None
    """The expert biases, where there are some."""


class Loads(NamedTuple):
    """One number a layer, from its counts alone."""

    max_over_mean_L: Tensor
    variation_L: Tensor
    entropy_L: Tensor


def loads(counts_LE: Tensor) -> Loads:
    """Busiest over mean, standard deviation over mean (Shazeer et al. 2017, eq. 6-7 before squaring), entropy over ln E.

    The entropy is 1 for an even load and 0 where one expert takes all. Without any token: 0, 0, 1.
    """
    experts = counts_LE.shape[1]
    total_L1 = counts_LE.sum(1, keepdim=True)
    share_LE = torch.where(total_L1 > 0, counts_LE.double() / total_L1.clamp(min=1), 1 / experts)
    entropy_L = torch.special.entr(share_LE).sum(1) / math.log(experts) if experts > 1 else torch.ones(len(counts_LE)).double()
    variation_L = (experts * share_LE).std(1, correction=0)
    return Loads(torch.where(total_L1 > 0, experts * share_LE, 0.0).amax(1), variation_L, entropy_L)


def brief_metrics(step: Step) -> dict[str, float]:
    """At most 21 keys beside those of `metrics.load_metrics`; a dense model has none."""
    if not step.counts_LE.numel():
        return {}
    load, routed_L = loads(step.counts_LE), step.counts_LE.sum(1)
    record = {
        **_worst("moe/load_cv", load.variation_L, step.layers),
        **_worst("moe/load_entropy", load.entropy_L, step.layers, least=True),
        "moe/dead_fraction": step.dead / step.counts_LE.numel(),
    }
    dropped = _worst("moe/dropped_fraction", step.dropped_L / routed_L.clamp(min=1), step.layers)
    del dropped["moe/dropped_fraction_mean"]  # close to dropped_fraction, which is of all layers together
    record |= dropped
    if step.router_metrics_LG.numel():
        record |= _of_router_metrics(step)
    if step.bias_LE is not None:
        record["moe/expert_bias_range"] = (step.bias_LE.amax(1) - step.bias_LE.amin(1)).max().item()
    return record


def layer_metrics(step: Step) -> dict[str, float]:
    """What tier detailed adds: four keys for each layer."""
    if not step.counts_LE.numel():
        return {}
    load, record = loads(step.counts_LE), {}
    values = {"load_max_over_mean": load.max_over_mean_L, "load_entropy": load.entropy_L, "dropped": step.dropped_L}
    if step.router_metrics_LG.numel():
        values["router_entropy"] = per_token(step.router_metrics_LG, "entropy")
    for name, values_L in values.items():
        record |= {f"moe/{name}/layer_{layer}": value for layer, value in zip(step.layers, values_L.tolist(), strict=True)}
    return record


def per_token(router_metrics_LG: Tensor, name: str) -> Tensor:
    """(L,): a router metric divided by the tokens."""
    return router_metrics_LG[:, SUMS.index(name)] / router_metrics_LG[:, SUMS.index("tokens")].clamp(min=1)


def _of_router_metrics(step: Step) -> dict[str, float]:
    """A rank is overloaded by its rows over the mean of all ranks. All wait for the busiest one at every exchange, so the time of a
    step goes with the sum over layers of the busiest rank's rows: over the sum of the means that is the skew."""
    mean_L = step.router_metrics_LG[:, SUMS.index("rows")] / step.ranks
    busiest_L = step.peaks_LP[:, 1]
    return {
        **_worst("moe/router_entropy", per_token(step.router_metrics_LG, "entropy"), step.layers, least=True),
        "moe/top1_probability": per_token(step.router_metrics_LG, "top1").mean().item(),
        "moe/router_logit_norm": per_token(step.router_metrics_LG, "logit_norm").mean().item(),
        "moe/router_logit_max": step.peaks_LP[:, 0].max().item(),
        "moe/rank_overload": torch.where(mean_L > 0, busiest_L / mean_L.clamp(min=1e-9), 1.0).max().item(),
        "moe/exchange_skew": (busiest_L.sum() / mean_L.sum()).item() if mean_L.sum() > 0 else 1.0,
    }


def _worst(name: str, values_L: Tensor, layers: Sequence[int], least: bool = False) -> dict[str, float]:
    """The first of the worst layers, which is the one with the least or the most."""
    at = int(values_L.argmin() if least else values_L.argmax())
    return {name: values_L[at].item(), f"{name}_layer": layers[at], f"{name}_mean": values_L.double().mean().item()}
