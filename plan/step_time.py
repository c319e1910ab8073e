"""Predicts the seconds of an optimizer step, as a range, from the counts of plan/workload.py and few fitted coefficients.

    step = (micro-batches + bubble) x (products + elementwise + launches + exposed exchange + tensor + context + p2p)
           + exposed gathers and gradients + optimizer

Coefficients are shares of what a data sheet promises, shares of what hides, and one fixed cost of a layer. plan/fit.py fits them.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..parallel.config import ParallelConfig
from .cluster import Cluster
from .model_work import ModelWork
from .workload import Again, Batch, Traffic, Workload, workload

COEFFICIENTS = Path(__file__).with_name("coefficients.json")


class Tuning(Enum):
    """Who made the software and the measurement."""

    vendor = "vendor"
    """The maker of the GPUs, for its own tables."""
    community = "community"
    """Anybody else, and tokenyard."""


@dataclass(frozen=True)
class Coefficients:
    """Shares are those of data-sheet peaks, between 0 and 1."""

    hopper_bf16: float
    """Share of the peak that large products with dense weights reach."""
    hopper_fp8: float
    blackwell_bf16: float
    blackwell_fp8: float
    experts: float
    """What grouped products of experts with many rows reach, over what those with dense weights do."""
    half_rows: float
    """Rows of an expert at which its products reach half of that: rows / (rows + half_rows)."""
    half_width: float
    """The same for the columns of one expert on a rank."""
    hopper_scores: float
    """Share of the bf16 peak that fused attention reaches."""
    blackwell_scores: float
    memory: float
    """Share of the memory's bandwidth that elementwise operations reach."""
    layer_seconds: float
    """What starting a layer with experts takes, forward and backward, beyond what its kernels compute, at the start of 2026."""
    yearly: float
    """Factor on `layer_seconds` and elementwise time each year: vendors fuse kernels and capture graphs."""
    nvlink: float
    """Share of NVLink's bandwidth that exchanges and collectives reach."""
    network: float
    exchange_hidden: float
    """Share of the exchange of experts that hides behind products, if nothing else is said."""
    overlap_hidden: float
    """The same with parallel.pipeline_overlap or overlap_chunks."""
    gradients_hidden: float
    """Share of gathers and gradient sums that hides, as far as there is computation to hide them behind."""
    community: float
    """Factor on all time of software that no vendor tuned."""
    natural: float
    """Load of the busiest rank over the mean, if no balance is forced."""
    vendor_low: float
    """Factors from the likely seconds to the ends of the range."""
    vendor_high: float
    community_low: float
    community_high: float


@dataclass(frozen=True)
class Terms:
    """Seconds of one step by what they are spent on. What hides behind something else is counted here too."""

    products: float
    elementwise: float
    """Bound by memory: norms, activations, permutations, the loss."""
    launches: float
    exchange_inside: float
    """Of experts, inside a domain of NVLink."""
    exchange_network: float
    tensor: float
    context: float
    gathers: float
    """FSDP's weights, and gradients if they are reduced in each micro-batch."""
    gradients: float
    messages: float
    """Between stages of a pipeline."""
    bubble: float
    optimizer: float

    @property
    def sum(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StepTime:
    terms: Terms
    hidden: Mapping[str, float]
    """Seconds of a term that pass while something else does; keys are fields of Terms."""
    behind: Mapping[str, str]
    """Behind what they hide."""
    low: float
    likely: float
    """Seconds of a step: the sum of the terms without what is hidden."""
    high: float
    mfu: float
    """By the bf16 peak of the GPU, at the likely time; that of fp8 if products are in fp8."""
    tokens_per_second_per_gpu: float
    flops_per_second_per_gpu: float
    """Of the model, without what is computed again."""


@functools.cache
def coefficients() -> Coefficients:
    """Returns those that plan/fit.py wrote."""
    plain: dict[str, Any] = json.loads(COEFFICIENTS.read_text())
    return Coefficients(**plain["coefficients"])


def predict(
    work: ModelWork,
    parallel: ParallelConfig,
    batch: Batch,
    cluster: Cluster,
    precision: str = "bf16",
    tuning: Tuning = Tuning.community,
    balanced: bool = True,
    year: float = 2026.5,
    again: Again | None = None,
    using: Coefficients | None = None,
) -> StepTime:
    """Returns the time of a step of the slowest rank.

    `precision` of products: bf16 or fp8. `balanced`: each expert gets as many rows as any other. `year`: when the software was
    made. `again` replaces what parallel.recompute stands for. Raises ValueError if the batch does not divide, or if the GPU has no
    products of that precision.
    """
    counts = workload(work, parallel, batch, cluster, again)
    return seconds(counts, cluster, Software(precision, tuning, balanced, year, overlaps(parallel)), using or coefficients())


def overlaps(parallel: ParallelConfig) -> bool:
    """Whether the layout is made to hide the exchange of experts."""
    return parallel.pipeline_overlap or parallel.overlap_chunks > 1


@dataclass(frozen=True)
class Software:
    """What the seconds depend on besides the counts and the GPUs."""

    precision: str = "bf16"
    tuning: Tuning = Tuning.community
    balanced: bool = True
    year: float = 2026.5
    overlap: bool = False


def seconds(counts: Workload, cluster: Cluster, software: Software, using: Coefficients) -> StepTime:
    """Returns the time of a step with these counts. Raises ValueError if the GPU has no products of the precision."""
    gpu, times = cluster.gpu, counts.micro_batches
    if software.precision not in gpu.flops:
        raise ValueError(f"{gpu.title} has no products in {software.precision}")
    family = "blackwell" if gpu.generation in ("blackwell", "cdna4") else "hopper"
    kind = "fp8" if software.precision == "fp8" else "bf16"
    peak, share = gpu.flops[software.precision], getattr(using, f"{family}_{kind}")
    hot = 1.0 if software.balanced else using.natural
    filled = counts.expert_rows / (counts.expert_rows + using.half_rows)
    wide = counts.expert_hidden / (counts.expert_hidden + using.half_width)
    products = counts.dense_flops / (peak * share)
    products += hot * counts.expert_flops / (peak * share * using.experts * filled * wide)
    products += counts.score_flops / (gpu.flops["bf16"] * getattr(using, f"{family}_scores"))
    made = using.yearly ** (software.year - 2026)
    elementwise = counts.elementwise_bytes / (gpu.memory_bytes_per_second * using.memory) * made
    launches = counts.layers * using.layer_seconds * made

    def inside(traffic: Traffic) -> float:
        return traffic.inside / (gpu.nvlink_bytes_per_second * using.nvlink)

    def network(traffic: Traffic) -> float:
        return traffic.network / (gpu.network_bytes_per_second * using.network)

    def collective(traffic: Traffic) -> float:
        return max(inside(traffic), network(traffic))

    exchanges = hot * inside(counts.exchange), hot * network(counts.exchange)
    hides = using.overlap_hidden if software.overlap else using.exchange_hidden
    hidden = [min(each * hides, products) for each in exchanges]
    tensor, context, messages = map(collective, (counts.tensor, counts.context, counts.messages))
    exposed = products + elementwise + launches + sum(exchanges) - sum(hidden) + tensor + context + messages
    computing = times * (products + elementwise)
    sums = collective(counts.gathers), collective(counts.gradients)
    hidden_sums = [min(each * using.gradients_hidden, computing / 2) for each in sums]
    terms = Terms(
        times * products,
        times * elementwise,
        times * launches,
        times * exchanges[0],
        times * exchanges[1],
        times * tensor,
        times * context,
        sums[0],
        sums[1],
        times * messages,
        counts.bubble * exposed,
        counts.optimizer_bytes / gpu.memory_bytes_per_second / using.memory,
    )
    hidden = {
        "exchange_inside": times * hidden[0],
        "exchange_network": times * hidden[1],
        "gathers": hidden_sums[0],
        "gradients": hidden_sums[1],
    }
    slower = using.community if software.tuning is Tuning.community else 1.0
    likely = slower * (terms.sum - sum(hidden.values()))
    return StepTime(
        Terms(*(slower * getattr(terms, field.name) for field in fields(terms))),
        {name: slower * took for name, took in hidden.items()},
        {name: "products" if "exchange" in name else "products and elementwise operations" for name in hidden},
        likely * getattr(using, f"{software.tuning.value}_low"),
        likely,
        likely * getattr(using, f"{software.tuning.value}_high"),
        counts.flops / likely / peak,
        counts.tokens / cluster.ranks / likely,
        counts.flops / likely,
    )
