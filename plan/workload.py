"""What the slowest rank of a layout computes, moves and sends in one optimizer step: counts, without any seconds.

D width of the model, T tokens of a micro-batch that pass a rank's layers before tensor ranks share them, K experts of a token.
"""

from dataclasses import dataclass

from ..moe.config import SCALE_BLOCK, ModelConfig
from ..moe.param_shapes import head_width
from ..parallel.config import ContextExchange, Exchange, ExchangeDtype, ParallelConfig, Recompute
from ..parallel.layout import data_ranks, mesh_sizes
from .gpu_cluster import Cluster
from .model_work import LayerWork, ModelWork

BYTES = 2
"""Of an activation that is moved or sent, in bf16 also where products are in fp8."""
FULL_BYTES = 4
"""Of a gradient that is summed over ranks, and of each of the four numbers an optimizer keeps of a parameter."""
BUBBLE = {"1f1b": 1.0, "interleaved": 1.0, "zbh1": 1 / 3, "zbv": 1 / 6}
"""Idle time, as a multiple of (P - 1) micro-batches through a rank's stages, before it is divided by the stages of a rank.
Narayanan et al. 2021 (arXiv:2104.04473), section 2.2; for zbh1 (P - 1)(F + B - W) with F = B = W, Qi et al. 2024
(arXiv:2401.10241), table 2; zbv ideally has none, half of zbh1 stands for what their figure 8 still shows."""


@dataclass(frozen=True)
class StepBatch:
    """Of one optimizer step. Sequences have the length of the ModelWork."""

    sequences: int
    micro: int
    """Sequences of a micro-batch on one data rank."""


@dataclass(frozen=True)
class Recomputed:
    """Shares of the forward pass that are computed again in the backward pass; the elementwise part goes with the dense one."""

    dense: float = 0.0
    experts: float = 0.0
    scores: float = 0.0
    exchange: float = 0.0
    elementwise: float = 0.0


RECOMPUTED = {
    Recompute.none: Recomputed(),
    Recompute.selective: Recomputed(elementwise=1.0),
    Recompute.block: Recomputed(1.0, 1.0, 1.0, 1.0, 1.0),
}
"""Of recompute=offload neither the time of the copies nor the memory is known here."""


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that a GPU sends, and receives as many: to GPUs of its domain, and over its share of the network."""

    inside: float = 0.0
    network: float = 0.0

    def __add__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(self.inside + other.inside, self.network + other.network)

    def __mul__(self, times: float) -> "LinkBytes":
        return LinkBytes(self.inside * times, self.network * times)


@dataclass(frozen=True)
class Workload:
    """Of one rank. Everything is for one micro-batch, forward and backward, unless `a step` is said."""

    flops: float
    """A step, without what is computed again: those of MFU, the share of this rank if all had the same."""
    tokens: float
    """A step, of the whole batch."""
    micro_batches: int
    """A step."""
    bubble: float
    """A step: micro-batches for which the rank waits because its pipeline fills and drains."""
    rows: float
    """Rows of the products with dense weights."""
    dense_flops: float
    score_flops: float
    expert_rows: float
    """Rows of one expert."""
    expert_hidden: float
    """Columns of one expert on this rank."""
    expert_flops: float
    elementwise_bytes: float
    """Read and written by norms, activations, residual additions, permutations and rotary embeddings."""
    quantized_bytes: float
    """The same by which inputs of products become fp8, if they do."""
    stages: int
    """Of a pipeline, on this rank; 0 without one."""
    layers: float
    """Layers that are started, dense ones counted as half of one with experts."""
    exchange: LinkBytes
    tensor: LinkBytes
    context: LinkBytes
    messages: LinkBytes
    """Between the stages of a pipeline."""
    gathers: LinkBytes
    """A step: FSDP's weights, and gradients if it reduces those of each micro-batch."""
    gradients: LinkBytes
    """A step: what is reduced once, to shards and over replicas."""
    optimizer_bytes: float
    """A step."""


def workload(
    work: ModelWork,
    parallel: ParallelConfig,
    batch: StepBatch,
    cluster: Cluster,
    recomputed: Recomputed | None = None,
    gradient_bytes: int = FULL_BYTES,
) -> Workload:
    """Returns the counts for `cluster.ranks` ranks. The rules of the configuration must hold; `recomputed` replaces what
    parallel.recompute stands for. Raises ValueError if the batch does not divide by data ranks and micro-batches.
    """
    config, size = work.config, mesh_sizes(parallel, cluster.ranks)
    recomputed = recomputed or RECOMPUTED[parallel.recompute]
    data = data_ranks(parallel, cluster.ranks)
    micro_batches, rest = divmod(batch.sequences, data * batch.micro)
    if rest or not micro_batches:
        raise ValueError(f"{batch.sequences} sequences are no multiple of {data} data ranks x {batch.micro}")
    rank = work.slowest_rank(parallel)
    T = batch.micro * work.length / parallel.context
    own, chunks = T / parallel.tensor, parallel.pipeline_stages // parallel.pipeline
    weights, gradients, replicas, kept = _states(rank, parallel, cluster, size, gradient_bytes)
    sums = micro_batches if parallel.zero > 1 else 1
    rows = own * config.width * rank.expert_layers * BYTES
    there = (1 + 1 / SCALE_BLOCK) / BYTES if parallel.exchange_dtype is ExchangeDtype.fp8 else 1.0
    return Workload(
        flops=3 * work.whole.flops * batch.sequences * work.length / cluster.ranks,
        tokens=batch.sequences * work.length,
        micro_batches=micro_batches,
        bubble=BUBBLE[parallel.pipeline_schedule.value] * (parallel.pipeline - 1) / chunks,
        rows=T,
        dense_flops=(3 + recomputed.dense) * own * rank.dense_flops,
        # FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1): 5 products in the backward pass, 2 in the forward pass.
        score_flops=(3.5 + recomputed.scores) * own * rank.score_flops,
        expert_rows=own * parallel.expert * parallel.expert_tensor * config.moe.top_k / max(1, config.moe.experts),
        expert_hidden=config.moe.hidden / parallel.expert_tensor,
        expert_flops=(3 + recomputed.experts) * own * rank.expert_flops,
        elementwise_bytes=(3 + recomputed.elementwise) * own * BYTES * _moved(config, rank, parallel),
        quantized_bytes=(3 + recomputed.dense) * own * BYTES * _quantized(config, rank),
        stages=chunks if parallel.pipeline > 1 else 0,
        layers=rank.expert_layers + 0.5 * (rank.layers - rank.expert_layers),
        exchange=copies(config, parallel, cluster) * ((3 + there + recomputed.exchange * (1 + there)) * rows),
        tensor=_ring(cluster, parallel.tensor) * (5 * BYTES * T * config.width * (rank.layers + rank.dense_feedforwards)),
        context=_context(work, rank, parallel, cluster) * T,
        messages=_neighbour(cluster, cluster.ranks // parallel.pipeline) * (2 * BYTES * own * config.width * chunks)
        if parallel.pipeline > 1
        else LinkBytes(),
        gathers=weights * (2 * micro_batches if parallel.zero == 3 else 1) + gradients * (sums if sums > 1 else 0),
        gradients=gradients * (1 if sums == 1 else 0) + replicas,
        optimizer_bytes=8 * FULL_BYTES * kept,
    )


def copies(config: ModelConfig, parallel: ParallelConfig, cluster: Cluster) -> LinkBytes:
    """Returns how often a token's row is sent to other ranks on its way to its experts, with experts chosen evenly at random.

    plain: once for each expert on another rank; deduplicated: once for each such rank; hierarchical: once for each domain, and
    inside it once for each rank; gather: to all ranks. The way back is the same. Each row goes to all expert_tensor ranks.
    """
    ranks = parallel.expert * parallel.expert_tensor
    if ranks == 1:
        return LinkBytes()
    near, K, E = cluster.reached(ranks), config.moe.top_k, config.moe.experts
    if parallel.exchange is Exchange.gather:
        return LinkBytes(near - 1, ranks - near)
    if parallel.exchange in (Exchange.plain, Exchange.symmetric):
        rows = K * parallel.expert_tensor
    else:
        rows = ranks * (1 - _missed(E, E // parallel.expert, K))
    if parallel.exchange is not Exchange.hierarchical:
        return LinkBytes(rows * (near - 1) / ranks, rows * (ranks - near) / ranks)
    held = E * max(near, parallel.expert_tensor) // ranks
    # What came over the network goes on inside of the domain, but for the rank that it came to.
    return LinkBytes(rows * (near - 1) / near, (ranks / near - 1) * (1 - _missed(E, held, K)))


def _missed(experts: int, held: int, chosen: int) -> float:
    """Returns the probability that none of `held` of the experts is among the `chosen`, which differ from each other."""
    probability = 1.0
    for index in range(chosen):
        probability *= max(0, experts - held - index) / (experts - index)
    return probability


def _ring(cluster: Cluster, ranks: int, step: int = 1) -> LinkBytes:
    """Returns what a GPU sends in an all-gather or reduce-scatter of one byte in all, over ranks each `step` after the last.

    A ring passes through each domain once, so its GPUs share among their network cards what leaves it
    (NCCL's "bus bandwidth", NVIDIA/nccl-tests doc/PERFORMANCE.md).
    """
    near = cluster.reached(ranks, step)
    return LinkBytes((ranks - 1) / ranks if near > 1 else 0.0, (ranks - near) / ranks / near if ranks > near else 0.0)


def _neighbour(cluster: Cluster, step: int) -> LinkBytes:
    """Returns a byte to the rank `step` further."""
    return LinkBytes(1.0) if cluster.reached(2, step) == 2 else LinkBytes(0.0, 1.0)


def _context(work: ModelWork, rank: LayerWork, parallel: ParallelConfig, cluster: Cluster) -> LinkBytes:
    """Returns the bytes of attention between context ranks, of a token: forward once, backward once more and for the gradient."""
    config, ranks = work.config, parallel.context
    if parallel.context_exchange is ContextExchange.gather:
        elements = work.kv_elements / (parallel.tensor if work.sliced_kv else 1)
        return _ring(cluster, ranks, parallel.tensor) * (3 * BYTES * rank.layers * elements * ranks)
    widths = 2 * (config.heads + config.kv_heads) * head_width(config) / parallel.tensor
    return _ring(cluster, ranks, parallel.tensor) * (2 * BYTES * rank.layers * widths)


def _states(
    rank: LayerWork, parallel: ParallelConfig, cluster: Cluster, size: dict[str, int], gradient_bytes: int
) -> tuple[LinkBytes, LinkBytes, LinkBytes, float]:
    """Returns one gather of the weights and one reduction of the gradients over FSDP's shards, one sum over replicas, and the
    parameters that this rank keeps.
    """
    dense, experts = rank.dense_parameters / parallel.tensor, rank.expert_parameters / (parallel.expert * parallel.expert_tensor)
    cut = size["expert_shard"]
    step = parallel.expert * parallel.expert_tensor
    # Dense weights are sharded over context and data ranks, each `tensor` after the last.
    sharded = _ring(cluster, parallel.shard, parallel.tensor) * dense + _ring(cluster, cut, step) * experts
    copies_of_dense = size["replicate"] * size["shard"] * size["context"] // parallel.shard
    replicas = _ring(cluster, copies_of_dense, parallel.tensor * parallel.shard) * (dense / parallel.shard)
    replicas += _ring(cluster, size["expert_replicate"], step * cut) * (experts / cut)
    return sharded * BYTES, sharded * gradient_bytes, replicas * (2 * gradient_bytes), dense / parallel.shard + experts / cut


def _moved(config: ModelConfig, rank: LayerWork, parallel: ParallelConfig) -> float:
    """Returns the elements of a token that elementwise operations read and write in a forward pass.

    A layer: two norms (2 D each) and two residual additions (3 D each), and rotary embeddings and copies of about as much as one
    more of each (5 D in all): 15 D. Experts: permuted rows written, read and written again (K x 3 D), and the activation, which
    reads two hidden columns and writes one (K x 3 F). Biases are read into
    and written with what they are added to. The head: logits in fp32, read twice and written once (6 V).
    """
    moe = config.moe
    experts = moe.top_k * (3 * config.width + (1 + moe.activation.projections) * moe.hidden)
    if moe.bias:
        experts += moe.top_k * 2 * (config.width + moe.activation.projections * moe.hidden)
    ordinary = 15 * config.width * rank.layers + 3 * config.hidden * rank.dense_feedforwards
    shared = 3 * moe.shared_hidden
    return ordinary + (experts + shared) * rank.expert_layers + 6 * config.vocabulary * rank.heads


def _quantized(config: ModelConfig, rank: LayerWork) -> float:
    """Returns the elements of a token, counted as bf16, that become fp8 in a forward pass, written row by row and transposed.

    Of each layer the inputs of the projections (2 D), and the inputs of an expert's two products (K x (D + F)); an element is read
    with 2 bytes and written twice with 1.
    """
    moe = config.moe
    experts = moe.top_k * (config.width + moe.hidden) + moe.shared_hidden
    return 2 * (2 * config.width * rank.layers + experts * rank.expert_layers + config.hidden * rank.dense_feedforwards)
