"""How tokens see each other: attention and rotary positions."""

from dataclasses import dataclass, field
from enum import Enum


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


@dataclass
class RopeConfig:
    theta: float = 10000.0
    """Base of the wavelengths."""
    fraction: float = 1.0
    """Share of each head's width that is rotated."""
    interleaved: bool = False
    """Rotate neighbouring pairs (DeepSeek) instead of halves (Llama)."""
    scaling: RopeScaling = RopeScaling.none
    """Longer contexts than trained on: linear, yarn (Peng et al. 2023), llama3."""
    factor: float = 1.0
    """How many times longer."""
    original_length: int = 4096
    """Context length before scaling."""
    beta_fast: float = 32.0
    """yarn: wavelengths that turn more often in the original context are kept."""
    beta_slow: float = 1.0
    """yarn: wavelengths that turn less often are interpolated."""
    attention_factor: float | None = None
    """yarn: factor of cosines and sines; null is 0.1 ln(factor) + 1."""
    mscale: float = 0.0
    """yarn in DeepSeek: weight of the logarithm in the factor of cosines and sines; 0 for none."""
    mscale_all: float = 0.0
    """yarn in DeepSeek: the same for the attention's scale, squared; 0 for none."""
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole dimensions (gpt-oss does not)."""
    low_frequency_factor: float = 1.0
    """llama3: below this many turns a wavelength is interpolated."""
    high_frequency_factor: float = 4.0
    """llama3: above this many turns a wavelength is kept."""


@dataclass
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2), for attention.kind=mla."""

    q_rank: int | None = None
    """Width of the latent of queries; null projects them directly (V2-Lite)."""
    kv_rank: int = 64
    """Width of the latent of keys and values, which is all that a cache keeps beside one rotary key."""
    nope_width: int = 32
    """Width of a head's part without rotary embedding."""
    rope_width: int = 16
    """Width of a head's rotary part, whose key all heads share."""
    value_width: int = 32
    """Width of a head's value."""


@dataclass
class AttentionConfig:
    kind: AttentionKind = AttentionKind.gqa
    """Grouped-query or multi-head latent attention."""
    qk_norm: QKNorm = QKNorm.none
    """RMSNorm of queries and keys."""
    qkv_bias: bool = False
    """Projections to queries, keys and values have biases."""
    output_bias: bool = False
    """The projection back has a bias."""
    window: int | None = None
    """A token sees so many tokens, itself included; null is all before it."""
    window_every: int = 1
    """Of every so many layers all but the last have the window (2: alternating, the first has it); 1: all layers."""
    sinks: bool = False
    """Each head has a learned logit that takes probability and gives nothing (gpt-oss)."""
    softcap: float | None = None
    """Logits become cap * tanh(logits / cap) (Grok, Gemma 2)."""
    scale: float | None = None
    """Factor of the logits; null is 1 / sqrt(width of a head)."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
