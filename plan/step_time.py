"""Predicts the seconds of an optimizer step, as a range, from the counts of plan/workload.py and few fitted coefficients.

    device = products + elementwise + exchange of experts that shows + tensor + context + messages
    step = (micro-batches + bubble) x root(device^2 + host^2) + gathers and gradients that show + optimizer

Coefficients are shares of what a data sheet promises, shares of what hides, and the host's time for a layer: plan/coefficients.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from ..parallel.config import Exchange, ParallelConfig
from .coefficients import Coefficients, coefficients
from .gpu_cluster import Cluster, Gpu
from .model_work import ModelWork
from .workload import LinkBytes, Recomputed, StepBatch, Workload, workload

BLACKWELL = ("blackwell", "blackwell_ultra", "cdna4")
"""Generations with the coefficients of Blackwell; all others have Hopper's. Of AMD's GPUs there is no row to fit."""


class Tuning(Enum):
    """Who made the software and the measurement."""

    vendor = "vendor"
    """The maker of the GPUs, for its own tables."""
    community = "community"
    """Anybody else."""
    tokenyard = "tokenyard"
    """This project, with what `make gpu` measured of it (plan/calibrate.py)."""


class Launching(Enum):
    """How the host starts kernels."""

    counted = "counted"
    """One by one, and it waits in each layer for the number of rows of each expert."""
    fixed = "fixed"
    """One by one, with fixed shapes: capacities, or parallel.exchange=symmetric."""
    captured = "captured"
    """The whole step as a CUDA graph."""


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
    """By the peak of the products' precision, at the likely time."""
    tokens_per_second_per_gpu: float
    flops_per_second_per_gpu: float
    """Of the model, without what is computed again."""


def predict(
    work: ModelWork,
    parallel: ParallelConfig,
    batch: StepBatch,
    cluster: Cluster,
    precision: str = "bf16",
    tuning: Tuning = Tuning.tokenyard,
    balanced: bool = True,
    launching: Launching | None = None,
    recomputed: Recomputed | None = None,
    using: Coefficients | None = None,
) -> StepTime:
    """Returns the time of a step of the slowest rank.

    `precision` of products: bf16 or fp8. `balanced`: each expert gets as many rows as any other. `launching` and `recomputed`
    replace what the layout stands for, and `using` the committed coefficients. Raises ValueError if the batch does not divide, or
    if the GPU has no products of that precision.
    """
    counts = workload(work, parallel, batch, cluster, recomputed)
    symmetric = parallel.exchange is Exchange.symmetric
    # One rank needs no counts of other ranks, and the symmetric exchange keeps them on the device.
    launching = launching or (Launching.fixed if symmetric or parallel.expert == 1 else Launching.counted)
    overlap = parallel.pipeline_overlap or parallel.overlap_chunks > 1
    software = Software(precision, tuning, balanced, launching, overlap, plain=not symmetric)
    return seconds(counts, cluster, software, using or coefficients(tuning is Tuning.tokenyard))


@dataclass(frozen=True)
class Software:
    """What the seconds depend on besides the counts and the GPUs."""

    precision: str = "bf16"
    tuning: Tuning = Tuning.vendor
    balanced: bool = True
    launching: Launching = Launching.counted
    overlap: bool = False
    plain: bool = True
    """Whether NCCL's all-to-all exchanges the rows of experts."""


def seconds(counts: Workload, cluster: Cluster, software: Software, using: Coefficients) -> StepTime:
    """Returns the time of a step with these counts. Raises ValueError if the GPU has no products of the precision."""
    gpu, times, links = cluster.gpu, counts.micro_batches, _Links(cluster.gpu, using)
    if software.precision not in gpu.flops:
        raise ValueError(f"{gpu.title} has no products in {software.precision}")
    products = _products(counts, gpu, software, using)
    elementwise = _elementwise(counts, gpu, software, using)
    slowed = (1.0 if software.balanced else using.natural) / (using.plain if software.plain else 1.0)
    exchanges = slowed * links.inside(counts.exchange), slowed * links.network(counts.exchange)
    hides = using.overlap_hidden if software.overlap else using.exchange_hidden
    shown = min(1.0, products / (hides * sum(exchanges))) if sum(exchanges) else 0.0
    hidden = [each * hides * shown for each in exchanges]
    tensor, context, messages = map(links.collective, (counts.tensor, counts.context, counts.messages))
    device = products + elementwise + sum(exchanges) - sum(hidden) + tensor + context + messages
    exposed = math.hypot(device, _host(counts, gpu, software, using))
    sums = links.collective(counts.gathers), links.collective(counts.gradients)
    # Gathers run ahead of all products; what is reduced once a step goes along with the last backward pass.
    room = times * exposed, exposed * 2 / 3
    terms = Terms(
        products=times * products,
        elementwise=times * elementwise,
        launches=times * (exposed - device),
        exchange_inside=times * exchanges[0],
        exchange_network=times * exchanges[1],
        tensor=times * tensor,
        context=times * context,
        gathers=sums[0],
        gradients=sums[1],
        messages=times * messages,
        bubble=counts.bubble * exposed,
        optimizer=counts.optimizer_bytes / (gpu.memory_bytes_per_second * using.memory),
    )
    behind = {
        "exchange_inside": times * hidden[0],
        "exchange_network": times * hidden[1],
        "gathers": min(sums[0] * using.gradients_hidden, room[0]),
        "gradients": min(sums[1] * using.gradients_hidden, room[1]),
    }
    slower = using.community if software.tuning is Tuning.community else 1.0
    likely = slower * (terms.sum - sum(behind.values()))
    low, high = {
        Tuning.vendor: (using.vendor_low, using.vendor_high),
        Tuning.community: (using.community_low, using.community_high),
        # Its step on one GPU was measured, but how it shares links and hides exchanges was not.
        Tuning.tokenyard: (using.vendor_low, using.community_high),
    }[software.tuning]
    return StepTime(
        terms=Terms(*(slower * getattr(terms, field.name) for field in fields(terms))),
        hidden={name: slower * took for name, took in behind.items()},
        behind={name: "products" if "exchange" in name else "the rest of the pass" for name in behind},
        low=likely * low,
        likely=likely,
        high=likely * high,
        mfu=counts.flops / likely / gpu.flops[software.precision],
        tokens_per_second_per_gpu=counts.tokens / cluster.ranks / likely,
        flops_per_second_per_gpu=counts.flops / likely,
    )


def _products(counts: Workload, gpu: Gpu, software: Software, using: Coefficients) -> float:
    """Returns the seconds of the products of a micro-batch. Attention computes in bf16 also where the others are in fp8.

    Experts with few rows or few columns on a rank fill a GPU badly: they reach n / (n + half) of the rate, which is
    what padded tiles, and a fixed time to start and to finish, come to.
    """
    blackwell, fp8 = gpu.generation in BLACKWELL, software.precision == "fp8"
    share = {
        (False, False): using.hopper_bf16,
        (False, True): using.hopper_fp8,
        (True, False): using.blackwell_bf16,
        (True, True): using.blackwell_fp8,
    }[blackwell, fp8]
    rate = gpu.flops[software.precision] * share * (using.ultra if gpu.generation == "blackwell_ultra" else 1.0)
    filled = using.experts * counts.expert_rows / (counts.expert_rows + using.half_rows)
    filled *= counts.expert_hidden / (counts.expert_hidden + using.half_width)
    experts = counts.expert_flops * (1.0 if software.balanced else using.natural)
    scores = gpu.flops["bf16"] * (using.blackwell_scores if blackwell else using.hopper_scores)
    return counts.dense_flops / rate + (experts / (rate * filled) if experts else 0.0) + counts.score_flops / scores


def _elementwise(counts: Workload, gpu: Gpu, software: Software, using: Coefficients) -> float:
    """Returns the seconds of what the memory's bandwidth bounds in a micro-batch."""
    moved = counts.elementwise_bytes + (counts.quantized_bytes if software.precision == "fp8" else 0.0)
    fused = using.captured_memory if software.launching is Launching.captured else 1.0
    return fused * moved / (gpu.memory_bytes_per_second * using.memory)


def _host(counts: Workload, gpu: Gpu, software: Software, using: Coefficients) -> float:
    """Returns the seconds that the host takes to start a micro-batch.

    The step takes the root of the sum of the squares of this and the device's time: nearly the larger one, and more where they are
    alike, since the device waits for the host in some places (counts of rows, messages) and runs behind it in others.
    """
    started = {Launching.counted: 1.0, Launching.fixed: using.fixed_layer, Launching.captured: using.captured_layer}
    layer = using.layer_seconds * (using.fp8_layer if software.precision == "fp8" else 1.0) * started[software.launching]
    return (counts.layers * layer + counts.stages * using.stage_seconds) * (using.grace_layer if gpu.host == 4 else 1.0)


@dataclass(frozen=True)
class _Links:
    """Seconds of traffic."""

    gpu: Gpu
    using: Coefficients

    def inside(self, traffic: LinkBytes) -> float:
        return traffic.inside / (self.gpu.nvlink_bytes_per_second * self.using.nvlink)

    def network(self, traffic: LinkBytes) -> float:
        return traffic.network / (self.gpu.network_bytes_per_second * self.using.network)

    def collective(self, traffic: LinkBytes) -> float:
        """A ring is as fast as its slowest link."""
        return max(self.inside(traffic), self.network(traffic))
