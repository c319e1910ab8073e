"""The degrees of parallelism. What follows from them, such as the number of replicas, is not a setting."""

from dataclasses import dataclass, field
from enum import Enum

from ..ranges import within


class Exchange(Enum):
    """How token rows travel to the ranks of their experts and back."""

    plain = "plain"
    deduplicated = "deduplicated"
    hierarchical = "hierarchical"
    gather = "gather"
    symmetric = "symmetric"
    deepep = "deepep"


class ExchangeDtype(Enum):
    """The numbers in which tokens travel to their experts."""

    wide = "wide"
    fp8 = "fp8"


OWN_EXCHANGES = [each for each in Exchange if each is not Exchange.deepep]
"""Those that need no other package."""
DEEPEP_LACKS = "needs the package deep_ep, which `python setup.py install` in a clone of github.com/deepseek-ai/DeepEP installs"


class Overflow(Enum):
    """What happens to choices that the symmetric exchange has no room for."""

    fatal = "fatal"
    drop = "drop"
    repair = "repair"


class Recompute(Enum):
    """What a block computes again in the backward pass instead of keeping it; or that it keeps it elsewhere."""

    none = "none"
    block = "block"
    selective = "selective"
    offload = "offload"

    @property
    def repeats(self) -> bool:
        """Whether the backward pass computes anything again."""
        return self in (Recompute.block, Recompute.selective)


class ContextExchange(Enum):
    """What attention exchanges between the ranks that share a sequence."""

    gather = "gather"
    heads = "heads"


PipelineSchedule = Enum("PipelineSchedule", {"1f1b": "1f1b", "interleaved": "interleaved", "zbh1": "zbh1", "zbv": "zbv"})
"""The order in which a rank passes micro-batches forward and backward; see pipeline/schedule.py."""


@dataclass
class ParallelConfig:
    tensor: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks that share each dense layer's weights and each sequence (tensor and sequence parallelism)."""
    shard: int = field(default=1, metadata=within("[1, inf)"))
    """Ways in which FSDP2 shards parameters, gradients and optimizer state; the remaining data ranks replicate. Context ranks are
    among these ways."""
    zero: int = field(default=3, metadata=within("[1, 3]"))
    """What FSDP2 keeps whole within a step, as ZeRO-3, -2 or -1. 3: nothing, weights are gathered for each pass; 2: weights;
    1: weights, and gradients until the last micro-batch, which alone reduces them."""
    expert: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks that share each MoE layer's experts; folded over data x tensor ranks, so it needs no ranks of its own."""
    expert_tensor: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks that share each expert's hidden columns; folded over data x tensor ranks too, neighbours inside an expert group."""
    context: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks that share each sequence through all of the model, an early and a late chunk of it each (context parallelism)."""
    context_exchange: ContextExchange = ContextExchange.gather
    """Attention gathers keys and values of all tokens (MLA: latents), or exchanges tokens for heads as in Ulysses (heads)."""
    exchange: Exchange = Exchange.plain
    """A row per token and: expert (plain), rank (deduplicated), first node and then rank (hierarchical); all tokens (gather); a row
    per token and expert, put straight into room of fixed size inside a node, so that the host waits for no counts (symmetric);
    deduplicated, by the kernels of the package deep_ep, in bf16 on GPUs (deepep)."""
    exchange_dtype: ExchangeDtype = ExchangeDtype.wide
    """Tokens travel to their experts as they are, or (fp8) rounded to e4m3, with a scale, a power of two, for 128 numbers. Then
    experts take rounded tokens on every layout. Outputs and gradients travel as they are."""
    exchange_rows: float = field(default=2.0, metadata=within("(0, inf)"))
    """Room for the rows of a rank's experts with exchange=symmetric, over their number at an even load; from parallel.expert on
    everything fits."""
    exchange_overflow: Overflow = Overflow.fatal
    """What happens if rows do not fit: the run ends before the update (fatal), the last of each crowded expert are dropped (drop),
    or they come in further rounds, whose number the host reads in each layer, 1 if all fit (repair)."""
    node_ranks: int | None = field(default=None, metadata=within("[1, inf)"))
    """Ranks of a node, for exchange=hierarchical; null is the launcher's number of local ranks."""
    overlap_chunks: int = field(default=1, metadata=within("[1, inf)"))
    """Chunks of a rank's tokens: one is exchanged while the experts compute another."""
    recompute: Recompute = Recompute.none
    """Activation checkpointing. block: keep only each block's input, and compute the block again in the backward pass; selective:
    keep results of products, attention, top-k and exchanges too, and compute only norms, activations and copies again; offload:
    compute nothing again, and keep activations of all but two blocks in the host's memory, from which they return ahead of use."""
    timeout_seconds: float = field(default=600.0, metadata=within("(0, inf)"))
    """A collective that has not completed after this long ends the job."""
    pipeline: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks (or groups of ranks that share them) among which the layers are cut; micro-batches pass through one after the other."""
    pipeline_schedule: PipelineSchedule = PipelineSchedule["1f1b"]
    """One forward and one backward pass take turns; interleaved: with several stages on each rank, which idles less. zbh1, zbv:
    ranks compute gradients of weights where they would wait, with one stage each, or two in a V, the first and the last together.
    """
    pipeline_chunks: int | None = field(default=None, metadata=within("[1, inf)"))
    """Stages on each rank; null is 1, with pipeline_schedule=interleaved or zbv 2."""
    pipeline_layers: list[int] | None = None
    """Layers of each stage, in order; null cuts them so that the costliest stage is as cheap as possible."""
    pipeline_overlap: bool = False
    """A forward and a backward pass run side by side, so that one computes while the other's exchange of experts travels."""

    @property
    def pipeline_stages(self) -> int:
        """Stages of a pipeline, on all its ranks."""
        several = self.pipeline_schedule in (PipelineSchedule["interleaved"], PipelineSchedule["zbv"])
        return self.pipeline * (self.pipeline_chunks or (2 if several else 1))
