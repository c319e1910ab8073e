"""The configuration of attention and rotary embeddings, a part of the model's in moe/config.py."""

from dataclasses import dataclass, field
from enum import Enum

from ..ranges import check_kinds, within


class AttentionKind(Enum):
    gqa = "gqa"
    mla = "mla"


class QKNorm(Enum):
    """RMSNorm of queries and keys: not at all, each head (Qwen3), or all heads together (OLMoE)."""

    none = "none"
    head = "head"
    full = "full"


class RopeScaling(Enum):
    none = "none"
    linear = "linear"
    yarn = "yarn"
    llama3 = "llama3"
    dynamic = "dynamic"
    longrope = "longrope"


@dataclass
class RopeConfig:
    __post_init__ = check_kinds
    theta: float = field(default=10000.0, metadata=within("(1, inf)"))
    """Base of the wavelengths."""
    fraction: float = field(default=1.0, metadata=within("(0, 1]"))
    """Share of each head's width that is rotated."""
    interleaved: bool = False
    """Rotate neighbouring pairs (DeepSeek) instead of halves (Llama)."""
    scaling: RopeScaling = RopeScaling.none
    """Longer contexts than trained on: linear, yarn (Peng et al. 2023), llama3, dynamic (NTK), longrope (Ding et al. 2024)."""
    factor: float = field(default=1.0, metadata=within("[1, inf)"))
    """How many times longer."""
    original_length: int = field(default=4096, metadata=within("[1, inf)"))
    """Context length before scaling; dynamic and longrope change angles only in longer sequences (or documents, if apart)."""
    beta_fast: float = field(default=32.0, metadata=within("(0, inf)"))
    """yarn: wavelengths that turn more often in the original context are kept."""
    beta_slow: float = field(default=1.0, metadata=within("(0, inf)"))
    """yarn: wavelengths that turn less often are interpolated."""
    attention_factor: float | None = field(default=None, metadata=within("(0, inf)"))
    """Factor of cosines and sines; null is 0.1 ln(factor) + 1 in yarn, sqrt(1 + ln(factor) / ln(original_length)) in longrope."""
    mscale: float = field(default=0.0, metadata=within("[0, inf)"))
    """yarn in DeepSeek: weight of the logarithm in the factor of cosines and sines; 0 for none."""
    mscale_all: float = field(default=0.0, metadata=within("[0, inf)"))
    """yarn in DeepSeek: the same for the attention's scale, squared; 0 for none."""
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole dimensions (gpt-oss does not)."""
    low_frequency_factor: float = field(default=1.0, metadata=within("(0, inf)"))
    """llama3: below this many turns a wavelength is interpolated."""
    high_frequency_factor: float = field(default=4.0, metadata=within("(0, inf)"))
    """llama3: above this many turns a wavelength is kept."""
    short_factors: list[float] = field(default_factory=list)
    """longrope: factors of the wavelengths, one for each rotated pair of a head, in sequences of at most original_length."""
    long_factors: list[float] = field(default_factory=list)
    """longrope: the same in longer sequences (Phi-3)."""


@dataclass
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2), for attention.kind=mla."""

    __post_init__ = check_kinds
    q_rank: int | None = field(default=None, metadata=within("[1, 1048576]"))
    """Width of the latent of queries; null projects them directly (V2-Lite)."""
    kv_rank: int = field(default=64, metadata=within("[1, 1048576]"))
    """Width of the latent of keys and values; a cache holds it and one rotary key."""
    nope_width: int = field(default=32, metadata=within("[1, 65536]"))
    """Width of a head's part without rotary embedding."""
    rope_width: int = field(default=16, metadata=within("[2, 65536]"))
    """Width of a head's rotary part, whose key all heads share."""
    value_width: int = field(default=32, metadata=within("[1, 65536]"))
    """Width of a head's value."""
    norm_epsilon: float | None = field(default=None, metadata=within("(0, inf)"))
    """norm_epsilon of the latents; null is the model's (Moonlight: 1e-6 beside 1e-5)."""
    scale_latents: bool = False
    """Multiply each latent after its norm by the root of model.width / its rank (LongCat-Flash)."""


@dataclass
class DeltaNetConfig:
    """Gated DeltaNet (Yang et al. 2024), the linear attention of attention.linear_every and attention.linear_layers."""

    __post_init__ = check_kinds
    key_heads: int = field(default=4, metadata=within("[1, 65536]"))
    """Heads of queries and keys."""
    value_heads: int = field(default=8, metadata=within("[1, 65536]"))
    """Heads of values, each with a state; a multiple of key_heads."""
    key_width: int = field(default=16, metadata=within("[1, 65536]"))
    """Width of a head's query and key."""
    value_width: int = field(default=16, metadata=within("[1, 65536]"))
    """Width of a head's value."""
    kernel: int = field(default=4, metadata=within("[1, 1024]"))
    """Tokens that the convolutions of queries, keys and values see, the token itself included."""


@dataclass
class AttentionConfig:
    __post_init__ = check_kinds
    kind: AttentionKind = AttentionKind.gqa
    """Grouped-query or multi-head latent attention."""
    qk_norm: QKNorm = QKNorm.none
    """RMSNorm of queries and keys."""
    qkv_bias: bool = False
    """Projections to queries, keys and values have biases."""
    output_bias: bool = False
    """The projection back has a bias."""
    output_gate: bool = False
    """What the heads return is multiplied by a sigmoid gate of the token (Qwen3-Next)."""
    linear_every: int = field(default=1, metadata=within("[1, inf)"))
    """In each run of this many layers, all but the last are gated DeltaNet instead of attention (Qwen3-Next: 4); 1: none."""
    linear_layers: list[int] = field(default_factory=list)
    """Further layers with gated DeltaNet, counted from 0."""
    window: int | None = field(default=None, metadata=within("[1, inf)"))
    """Tokens that a token attends to, itself included; null is all before it."""
    window_every: int = field(default=1, metadata=within("[1, inf)"))
    """In each run of this many layers, all but the last have the window (2: alternating, the first has it); 1: all layers."""
    full_layers: list[int] = field(default_factory=list)
    """Further layers without the window, counted from 0."""
    sinks: bool = False
    """Each head has a learned logit without a value, which takes part of the probability (gpt-oss)."""
    softcap: float | None = field(default=None, metadata=within("(0, inf)"))
    """Logits become cap * tanh(logits / cap) (Grok, Gemma 2)."""
    clip_qkv: float | None = field(default=None, metadata=within("(0, inf)"))
    """Queries, keys and values are clamped to this absolute value, after their norms and biases (OLMoE)."""
    scale: float | None = field(default=None, metadata=within("(0, inf)"))
    """Factor of the logits; null is 1 / sqrt(width of a head)."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    delta: DeltaNetConfig = field(default_factory=DeltaNetConfig)
