"""How many parameters a model has, by part, and how many FLOPs a token costs. No torch: it answers before anything is built.

FLOPs follow PaLM (Chowdhery et al. 2022), appendix B, with two differences that matter for MoE: only the experts that a token
passes are counted, and causal attention looks back over (S + 1) / 2 tokens on average, not S. One multiply-add is 2 FLOPs.
"""

from dataclasses import dataclass

from .config import ModelConfig


@dataclass
class Count:
    """Parameters by part, summed over all layers; a token passes `active_experts` of the `experts` and all of the rest."""

    embedding: int
    attention: int
    router: int
    experts: int
    active_experts: int
    shared: int
    dense: int
    norms: int
    head: int
    """0 if the head uses the embedding's weights."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.active + self.experts - self.active_experts

    @property
    def active(self) -> int:
        """Parameters a token uses. As in the field (Mixtral's 12.9B, DeepSeek-V3's 37B), embedding and head count in full."""
        always = self.embedding + self.attention + self.router + self.shared + self.dense + self.norms + self.head
        return always + self.active_experts


def count(config: ModelConfig) -> Count:
    """Parameters of the model that `config` describes."""
    moe, width = config.moe, config.width
    moe_layers = sum(config.moe_layer(index) for index in range(config.layers))
    embedding = config.vocabulary * width
    expert = _swiglu(width, moe.hidden)
    return Count(
        embedding=embedding,
        attention=config.layers * 2 * width * head_width(config) * (config.heads + config.kv_heads),
        router=moe_layers * moe.experts * width,
        experts=moe_layers * moe.experts * expert,
        active_experts=moe_layers * moe.top_k * expert,
        shared=moe_layers * _swiglu(width, moe.shared_hidden),
        dense=(config.layers - moe_layers) * _swiglu(width, config.hidden),
        norms=(2 * config.layers + 1) * width,
        head=0 if config.tie_embeddings else embedding,
    )


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one token in the forward pass, the mean over a sequence of `sequence_length` tokens that see all before them.

    2 x (attention + router + active experts + shared + dense + head weights) for the products with weights, and per layer
    4 x heads x head width x (S + 1) / 2 for queries with keys and probabilities with values. Look-ups, norms, softmax, rotary
    embedding and activations are not counted, nor is what masks between packed documents would save.
    """
    parts = count(config)
    head = config.vocabulary * config.width  # a product also where the weights are the embedding's
    weights = parts.attention + parts.router + parts.active_experts + parts.shared + parts.dense + head
    return 2 * weights + config.layers * 2 * config.heads * head_width(config) * (sequence_length + 1)


def training_flops_per_token(config: ModelConfig, sequence_length: int, recompute: bool = False) -> int:
    """FLOPs of one token in forward and backward: 3 x forward, which MFU counts; 4 x if activations are recomputed (HFU)."""
    return (4 if recompute else 3) * flops_per_token(config, sequence_length)


def head_width(config: ModelConfig) -> int:
    """Width of one attention head."""
    return config.head_width or config.width // config.heads


def _swiglu(width: int, hidden: int) -> int:
    """Weights of gate, up and down."""
    return 3 * width * hidden
