"""What a model is: all that decides its shape or its function, and nothing about how it is spread or trained.

One transformer whose parts are chosen here stands for every family; conf/model/ has a file for each published model.
"""

from dataclasses import dataclass, field
from enum import Enum

from .config_attention import AttentionConfig, AttentionKind, MLAConfig, QKNorm, RopeConfig, RopeScaling
from .config_routing import BalanceConfig, CapacityConfig, DropPolicy, GroupScore, RouterConfig, Scope, Score, Selection

__all__ = [
    "Activation",
    "AttentionConfig",
    "AttentionKind",
    "BalanceConfig",
    "CapacityConfig",
    "DropPolicy",
    "GroupScore",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "QKNorm",
    "RopeConfig",
    "RopeScaling",
    "RouterConfig",
    "Scope",
    "Score",
    "Selection",
]


class Activation(Enum):
    """The function of a feed-forward; those with `glu` have a gate."""

    swiglu = "swiglu"
    geglu = "geglu"
    swiglu_clamped = "swiglu_clamped"
    gelu = "gelu"
    relu = "relu"
    relu_squared = "relu_squared"


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
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid gate of the token (Qwen2-MoE)."""
    activation: Activation = Activation.swiglu
    """The experts' function."""
    bias: bool = False
    """The experts' projections have biases (gpt-oss)."""
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    z_coefficient: float = 0.001
    """Factor of the router z-loss of each MoE layer (ST-MoE, eq. 5); 0 turns it off."""
    capacity: CapacityConfig = field(default_factory=CapacityConfig)


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
    activation: Activation = Activation.swiglu
    """Function of dense layers and of the shared expert."""
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
    sandwich_norms: bool = False
    """RMSNorm also after attention and feed-forward, before the residual addition (Grok, Gemma 2)."""
    embedding_multiplier: float = 1.0
    """Factor of the embedding's output (Grok)."""
    output_multiplier: float = 1.0
    """Factor of the logits (Grok)."""
    output_softcap: float | None = None
    """The model's logits become cap * tanh(logits / cap)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 * layers) (GPT-2)."""
    mtp_depth: int = 0
    """Multi-token prediction modules in training (DeepSeek-V3, section 2.2): each predicts one token further."""
    mtp_coefficient: float = 0.3
    """Factor of the mean of their cross entropies."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def moe_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has experts."""
        later = index - self.dense_first
        return self.moe.experts > 0 and later >= 0 and (later + 1) % self.moe_every == 0

    def windowed_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has the attention's window."""
        every = self.attention.window_every
        return self.attention.window is not None and (every == 1 or (index + 1) % every != 0)
