"""What a model is: every setting that decides its shape or its function, and nothing about how it is spread or trained."""

from dataclasses import dataclass, field
from enum import Enum


class Scope(Enum):
    """Over which tokens a balance loss or a capacity is counted."""

    sequence = "sequence"
    batch = "batch"
    rank = "rank"


@dataclass
class BalanceConfig:
    coefficient: float = 0.01
    """Factor of the load-balance loss of each MoE layer (Switch Transformer, eq. 4); 0 turns it off."""
    scope: Scope = Scope.sequence
    """sequence and batch (the global micro-batch) do not depend on the layout; rank does, as in most peers."""


@dataclass
class MoEConfig:
    experts: int = 8
    """Routed experts per MoE layer; 0 makes every layer dense."""
    top_k: int = 2
    """Experts that each token chooses."""
    hidden: int = 256
    """Hidden width of one routed expert."""
    shared_hidden: int = 0
    """Hidden width of the expert that every token passes (DeepSeekMoE); 0 for none."""
    normalize_top_k: bool = True
    """Divide the chosen probabilities by their sum, as Mixtral does; top_k = 1 never does, or its router would not learn."""
    capacity_factor: float | None = None
    """Rows an expert takes, as a multiple of an even share (GShard); null is dropless."""
    capacity_scope: Scope = Scope.sequence
    """The tokens that compete for one expert's capacity; with sequence and batch the layout does not decide who is dropped."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    z_coefficient: float = 0.001
    """Factor of the router z-loss of each MoE layer (ST-MoE, eq. 5); 0 turns it off."""


@dataclass
class ModelConfig:
    layers: int = 4
    """Transformer blocks."""
    width: int = 128
    """Width of the residual stream (d_model)."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads (grouped-query attention); must divide heads."""
    head_width: int | None = None
    """Width of one head; null is width / heads."""
    hidden: int = 512
    """Hidden width of the feed-forward of dense layers."""
    vocabulary: int = 8192
    """Rows of the embedding; the tokenizer must not have more pieces."""
    dense_first: int = 0
    """The first so many layers are dense (DeepSeek)."""
    moe_every: int = 1
    """Of the remaining layers every so-many-th has experts, the others are dense (GShard uses 2)."""
    tie_embeddings: bool = False
    """The output head uses the embedding's weights."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 * layers) (GPT-2)."""
    moe: MoEConfig = field(default_factory=MoEConfig)

    def moe_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has experts."""
        later = index - self.dense_first
        return self.moe.experts > 0 and later >= 0 and (later + 1) % self.moe_every == 0
