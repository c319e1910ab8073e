"""The configuration of a model: everything that determines its parameters and its function, and nothing about training or layout.

One transformer covers every model family by these settings; conf/model/ has a file for each published model.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from ..ranges import check_kinds, within
from .attention_config import AttentionConfig, AttentionKind, DeltaNetConfig, MLAConfig, QKNorm, RopeConfig, RopeScaling

__all__ = [
    "Activation",
    "AttentionConfig",
    "AttentionKind",
    "BalanceConfig",
    "CapacityConfig",
    "DeltaNetConfig",
    "DropPolicy",
    "GroupScore",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "Products",
    "QKNorm",
    "RopeConfig",
    "RopeScaling",
    "RouterConfig",
    "Scope",
    "Score",
    "Selection",
]

# Routing: router, load balance and capacity.


class Scope(Enum):
    """The tokens over which a balance loss, a capacity or a balanced selection is computed."""

    sequence = "sequence"
    batch = "batch"
    rank = "rank"


class Score(Enum):
    """How router logits become scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    sqrtsoftplus = "sqrtsoftplus"


class Selection(Enum):
    """How experts are chosen."""

    top_k = "top_k"
    gshard = "gshard"
    expert_choice = "expert_choice"
    hash = "hash"
    sinkhorn = "sinkhorn"


class GroupScore(Enum):
    """The rank of a group of experts in group-limited selection."""

    max = "max"
    top2 = "top2"


class DropPolicy(Enum):
    """Which choices an expert keeps if it is full."""

    position = "position"
    priority = "priority"
    probability = "probability"
    random = "random"


@dataclass
class RouterConfig:
    __post_init__ = check_kinds
    score: Score = Score.softmax
    """How logits become scores: over all experts, or for each expert separately (DeepSeek-V3: sigmoid)."""
    selection: Selection = Selection.top_k
    """top_k; gshard (its algorithm 1, first choices first, second ones at random); expert_choice; hash of the token; sinkhorn."""
    softmax_after_top_k: bool = False
    """Choose by logits, then softmax over the chosen experts only (gpt-oss)."""
    normalize_top_k: bool = True
    """Divide the chosen scores by their sum (Mixtral); not if top_k = 1 (Switch), since the router could not learn then."""
    normalize_one: bool = False
    """normalize_top_k divides also with top_k = 1: the weight is 1, the router learns from its losses alone (imported models)."""
    scale: float = field(default=1.0, metadata=within("(0, inf)"))
    """Factor of the chosen weights (DeepSeek's routed_scaling_factor)."""
    bias: bool = False
    """The router's projection has a bias (gpt-oss)."""
    groups: int = field(default=1, metadata=within("[1, inf)"))
    """Groups of experts for group-limited selection (DeepSeek-V2); 1 is none."""
    top_groups: int = field(default=1, metadata=within("[1, inf)"))
    """Groups that a token may choose from."""
    group_score: GroupScore = GroupScore.max
    """max (DeepSeek-V2) or the sum of the two best (DeepSeek-V3)."""
    jitter: float = field(default=0.0, metadata=within("[0, 1)"))
    """In training, multiply the router's input by uniform noise from 1 - jitter to 1 + jitter (Switch)."""
    noise: bool = False
    """In training, add learned Gaussian noise to the logits (Shazeer 2017)."""
    null_experts: int = field(default=0, metadata=within("[0, inf)"))
    """Additional experts that compute nothing: a token that chooses one has fewer real experts."""
    copy_experts: int = field(default=0, metadata=within("[0, inf)"))
    """Of the null experts, those that return the token itself (identity experts of LongCat-Flash, copy experts of MoE++)."""
    constant_experts: int = field(default=0, metadata=within("[0, inf)"))
    """Of the null experts, those that return a learned mixture of the token and a learned vector (MoE++)."""


@dataclass
class BalanceConfig:
    __post_init__ = check_kinds
    coefficient: float = field(default=0.01, metadata=within("[0, inf)"))
    """Factor of the load-balance loss of each MoE layer (Switch Transformer, eq. 4); 0 turns it off."""
    scope: Scope = Scope.sequence
    """Scope of these losses and of sinkhorn. sequence and batch (the global micro-batch) do not depend on the layout; rank does."""
    pool_layers: bool = False
    """Make it one loss of all MoE layers together, of the top_k largest logits and their softmax, as transformers does."""
    sequence_coefficient: float = field(default=0.0, metadata=within("[0, inf)"))
    """Factor of DeepSeek-V3's complementary sequence-wise balance loss (eq. 17-20); 0 turns it off."""
    sequence_by_scores: bool = False
    """Count for it the top_k largest scores (eq. 18), not the choices made, which expert bias and groups change."""
    device_coefficient: float = field(default=0.0, metadata=within("[0, inf)"))
    """Factor of DeepSeek-V2's device-level balance loss over the router.groups in `scope` (eq. 26-28); 0 turns it off."""
    communication_coefficient: float = field(default=0.0, metadata=within("[0, inf)"))
    """Factor of DeepSeek-V2's communication balance loss over the same groups (eq. 29-31); 0 turns it off."""
    importance_coefficient: float = field(default=0.0, metadata=within("[0, inf)"))
    """Factor of the squared coefficient of variation of importance and load (Shazeer 2017) in `scope`; 0 turns it off."""
    bias_rate: float = field(default=0.0, metadata=within("[0, inf)"))
    """Step of the auxiliary-loss-free expert bias (DeepSeek-V3: 0.001), once per optimizer step; 0 turns it off."""
    schedule: list[float] = field(default_factory=list)
    """Pairs of step and factor, flattened: from each step on the coefficients of all balance losses are multiplied by it."""
    bias_schedule: list[float] = field(default_factory=list)
    """The same for bias_rate; DeepSeek-V3 sets it to 0 for the last 3 % of its tokens."""


BALANCE_COEFFICIENTS = (
    "coefficient",
    "sequence_coefficient",
    "device_coefficient",
    "communication_coefficient",
    "importance_coefficient",
)


@dataclass
class CapacityConfig:
    __post_init__ = check_kinds
    factor: float | None = field(default=None, metadata=within("(0, inf)"))
    """Rows an expert takes, as a multiple of an even share (GShard); null is dropless."""
    evaluation_factor: float | None = field(default=None, metadata=within("(0, inf)"))
    """The same outside training; null is dropless."""
    minimum: int = field(default=1, metadata=within("[1, inf)"))
    """Rows of a scope that an expert always takes."""
    scope: Scope = Scope.sequence
    """The tokens that compete for an expert, also in expert_choice; sequence and batch do not depend on the layout."""
    groups: int = field(default=1, metadata=within("[1, inf)"))
    """Groups of equal size that scope batch is split into, in the order of tokens (GShard's G); an expert has rows in each."""
    policy: DropPolicy = DropPolicy.position
    """Earlier tokens first; likelier choices; at random (outside training by position); priority: likelier tokens (V-MoE)."""
    pad: bool = False
    """Pad each expert's rows to its capacity (GShard): fixed shapes, more computation."""
    schedule: list[float] = field(default_factory=list)
    """Pairs of step and factor, flattened, as [0, 1.0, 1000, 1.5, 2000, 0]: the factor from each step on; 0 is dropless."""

    def factor_at(self, step: int) -> float | None:
        """Returns the factor in training at optimizer step `step` (the first is 1); None is dropless."""
        return at_step(self.schedule, step, self.factor) or None


def at_step(schedule: list[float], step: int, before: Any = 1.0) -> Any:
    """Returns the number that a flattened list of pairs (step, number) has for an optimizer step; `before` the first pair's."""
    return next((number for start, number in zip(schedule[-2::-2], schedule[::-2], strict=True) if step >= start), before)


class Activation(Enum):
    """The function of a feed-forward; those with `glu` have a gate."""

    swiglu = "swiglu"
    geglu = "geglu"
    swiglu_clamped = "swiglu_clamped"
    gelu = "gelu"
    relu = "relu"
    relu_squared = "relu_squared"

    @property
    def projections(self) -> int:
        """Projections of the input: 2 with a gate (gate and up), 1 without."""
        return 2 if "glu" in self.value else 1


SCALE_BLOCK, MX_BLOCK = 128, 32
"""Numbers that share a scale, of fp8_blockwise (in weights: squared), and of mxfp8."""


class Products(Enum):
    """The operands of products: as wide as the activations, or numbers of 8 bits with scales (moe/fp8.py)."""

    wide = "wide"
    fp8_rowwise = "fp8_rowwise"
    fp8_blockwise = "fp8_blockwise"
    mxfp8 = "mxfp8"

    @property
    def block(self) -> int | None:
        """Inputs that share a scale; None: all of a row, or no scale."""
        return {"fp8_blockwise": SCALE_BLOCK, "mxfp8": MX_BLOCK}.get(self.value)


@dataclass
class MoEConfig:
    __post_init__ = check_kinds
    experts: int = field(default=8, metadata=within("[0, 65536]"))
    """Routed experts per MoE layer; 0 makes every layer dense."""
    top_k: int = field(default=2, metadata=within("[1, inf)"))
    """Experts that each token chooses."""
    hidden: int = field(default=256, metadata=within("[1, 16777216]"))
    """Hidden width of one routed expert."""
    shared_hidden: int = field(default=0, metadata=within("[0, 16777216]"))
    """Hidden width of the expert that every token passes (DeepSeekMoE); 0 for none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid gate of the token (Qwen2-MoE)."""
    activation: Activation = Activation.swiglu
    """The experts' function."""
    products: Products = Products.wide
    """Products of routed and shared experts: wide, or of operands in e4m3, for outputs and gradients of inputs. A scale for each
    row (fp8_rowwise), 128 inputs of a row and 128 x 128 weights (fp8_blockwise), 32 inputs, a power of two (mxfp8)."""
    bias: bool = False
    """The experts' projections have biases (gpt-oss)."""
    dropout: float = field(default=0.0, metadata=within("[0, 1)"))
    """In training, the rate of dropout on the hidden columns of routed and shared experts (Switch's expert dropout)."""
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    z_coefficient: float = field(default=0.001, metadata=within("[0, inf)"))
    """Factor of the router z-loss of each MoE layer (ST-MoE, eq. 5); 0 turns it off."""
    z_schedule: list[float] = field(default_factory=list)
    """Pairs of step and factor, flattened: from each step on z_coefficient is multiplied by it."""
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    shortcut: bool = False
    """Experts stand beside a dense feed-forward and take the input of that one layer earlier (ScMoE; LongCat-Flash)."""

    def at(self, step: int) -> "MoEConfig":
        """Returns the configuration with the coefficients of its losses, and the rate of expert biases, at an optimizer step."""
        balance, z = self.balance, at_step(self.z_schedule, step)
        factor, bias = at_step(balance.schedule, step), at_step(balance.bias_schedule, step)
        if z == factor == bias == 1:
            return self
        scaled = {name: factor * getattr(balance, name) for name in BALANCE_COEFFICIENTS}
        balance = replace(balance, **scaled, bias_rate=bias * balance.bias_rate)
        return replace(self, balance=balance, z_coefficient=z * self.z_coefficient)


@dataclass
class ModelConfig:
    __post_init__ = check_kinds
    layers: int = field(default=4, metadata=within("[1, 1024]"))
    """Transformer blocks."""
    width: int = field(default=128, metadata=within("[1, 1048576]"))
    """Width of the residual stream (d_model)."""
    heads: int = field(default=8, metadata=within("[1, 65536]"))
    """Query heads."""
    kv_heads: int = field(default=4, metadata=within("[1, 65536]"))
    """Key and value heads (grouped-query attention); must divide heads."""
    head_width: int | None = field(default=None, metadata=within("[1, 65536]"))
    """Width of one head; null is width / heads."""
    hidden: int = field(default=512, metadata=within("[1, 16777216]"))
    """Hidden width of the feed-forward of dense layers."""
    activation: Activation = Activation.swiglu
    """Function of dense layers and of the shared expert."""
    products: Products = Products.wide
    """The same for dense layers' feed-forward and the projections of attention. Routers, head and embedding are never in FP8, nor
    gated DeltaNet."""
    vocabulary: int = field(default=8192, metadata=within("[1, 16777216]"))
    """Rows of the embedding; the tokenizer must not have more pieces. Where nothing sets another number than this one, a run has as
    many as its tokenizer has pieces, rounded up to a multiple of 128."""
    dense_first: int = field(default=0, metadata=within("[0, 1024]"))
    """Number of dense layers at the start (DeepSeek)."""
    moe_every: int = field(default=1, metadata=within("[1, inf)"))
    """Every moe_every-th of the remaining layers has experts, the others are dense (GShard: 2)."""
    dense_layers: list[int] = field(default_factory=list)
    """Further dense layers, counted from 0."""
    tie_embeddings: bool = False
    """The output head uses the embedding's weights."""
    norm_epsilon: float = field(default=1e-5, metadata=within("(0, inf)"))
    """Added to the mean square in RMSNorm."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + weight, and their weights start at 0 (Qwen3-Next)."""
    sandwich_norms: bool = False
    """Also RMSNorm after attention and feed-forward, before the residual addition (Grok, Gemma 2)."""
    pre_norms: bool = True
    """RMSNorm before attention and feed-forward; false, with sandwich_norms, leaves those after them (OLMo 2, FlexOlmo)."""
    residual_multiplier: float = field(default=1.0, metadata=within("(0, inf)"))
    """Factor of what attention and feed-forward add to the residual stream (Granite)."""
    embedding_multiplier: float = field(default=1.0, metadata=within("(0, inf)"))
    """Factor of the embedding's output (Grok)."""
    output_multiplier: float = field(default=1.0, metadata=within("(0, inf)"))
    """Factor of the logits (Grok)."""
    output_softcap: float | None = field(default=None, metadata=within("(0, inf)"))
    """The model's logits become cap * tanh(logits / cap)."""
    dropout: float = field(default=0.0, metadata=within("[0, 1)"))
    """In training, the rate of dropout on the embedding, on what attention and feed-forward add to the residual stream, on dense
    layers' hidden columns and on the last norm's output: T5's places, but for attention weights."""
    init_std: float = field(default=0.02, metadata=within("(0, inf)"))
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 * layers) (GPT-2)."""
    mtp_depth: int = field(default=0, metadata=within("[0, 64]"))
    """Modules of multi-token prediction in training (DeepSeek-V3, section 2.2); each predicts one token further."""
    mtp_coefficient: float = field(default=0.3, metadata=within("[0, inf)"))
    """Factor of the mean of their cross entropies."""
    mtp_after_norm: bool = False
    """Each module is fed hidden states after the norm before the head (transformers on DeepSeek-V3), not before it."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def moe_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has experts."""
        later = index - self.dense_first
        regular = later >= 0 and (later + 1) % self.moe_every == 0
        return self.moe.experts > 0 and regular and index not in self.dense_layers

    def dense_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has a dense feed-forward: without experts, or with the shortcut beside them."""
        return self.moe.shortcut or not self.moe_layer(index)

    def windowed_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has the attention's window; one with linear attention has none."""
        attention = self.attention
        regular = attention.window_every == 1 or (index + 1) % attention.window_every != 0
        return attention.window is not None and regular and index not in attention.full_layers and not self.linear_layer(index)

    def layer_kind(self, index: int) -> tuple[bool, bool, bool, bool]:
        """Returns what block `index` has of experts, a dense feed-forward, a window and linear attention."""
        return self.moe_layer(index), self.dense_layer(index), self.windowed_layer(index), self.linear_layer(index)

    def linear_layer(self, index: int) -> bool:
        """Whether block `index` (from 0) has gated DeltaNet; those of multi-token prediction have attention."""
        attention = self.attention
        return index < self.layers and ((index + 1) % attention.linear_every != 0 or index in attention.linear_layers)
