"""The name and shape of every parameter of a model, from the configuration alone. Does not import torch.

V vocabulary, D width, H query heads, G key-value heads, h width of a head, E experts, F hidden width of an expert.
In gated DeltaNet: C channels of queries and keys, or of values, K tokens of the convolution.
"""

from .config import AttentionKind, ModelConfig, QKNorm, Selection

Shapes = dict[str, tuple[int, ...]]


def shapes(config: ModelConfig) -> Shapes:
    """Returns all parameters of the model that `config` describes, as moe/model.py builds it; a tied head has none of its own."""
    D = config.width
    found: Shapes = {"embedding.weight": (config.vocabulary, D)}
    for index in range(config.layers):
        found |= _under(f"layers.{index}", block_shapes(config, index))
    found["norm.weight"] = (D,)
    if not config.tie_embeddings:
        found["head.weight"] = (config.vocabulary, D)
    for index in range(config.mtp_depth):
        found |= _under(f"mtp.{index}", _prediction(config, config.layers + index))
    return found


def block_shapes(config: ModelConfig, index: int) -> Shapes:
    """Returns the parameters of block `index`: dense, with experts, or both; with attention or gated DeltaNet."""
    D = config.width
    names = ["attention_norm", "feedforward_norm"] if config.pre_norms else []
    if config.sandwich_norms:
        names += ["attention_post_norm", "feedforward_post_norm"]
    latent, linear = config.attention.kind is AttentionKind.mla, config.linear_layer(index)
    experts = _moe(config) if config.moe_layer(index) else {}
    dense = _under("dense", _feedforward(config, config.hidden)) if config.dense_layer(index) else {}
    return {
        **{f"{name}.weight": (D,) for name in names},
        **_under("attention", _delta_net(config) if linear else _mla(config) if latent else _gqa(config)),
        **experts,
        **dense,
    }


def head_width(config: ModelConfig) -> int:
    """Returns the width of a head in grouped-query attention."""
    return config.head_width or config.width // config.heads


def rotary_width(config: ModelConfig) -> int:
    """Returns the number of dimensions of a head that are rotated."""
    if config.attention.kind is AttentionKind.mla:
        return config.attention.mla.rope_width
    return round(head_width(config) * config.attention.rope.fraction)


def _gqa(config: ModelConfig) -> Shapes:
    D, h, attention = config.width, head_width(config), config.attention
    widths = {"q": config.heads * h, "k": config.kv_heads * h, "v": config.kv_heads * h}
    found: Shapes = {f"{name}.weight": (width, D) for name, width in widths.items()}
    found["o.weight"] = (D, config.heads * h)
    if attention.output_gate:
        widths["gate"] = config.heads * h
        found["gate.weight"] = (widths["gate"], D)
    if attention.qkv_bias:
        found |= {f"{name}.bias": (width,) for name, width in widths.items()}
    if attention.output_bias:
        found["o.bias"] = (D,)
    if attention.qk_norm is not QKNorm.none:
        every = attention.qk_norm is QKNorm.full
        found |= {f"{name}_norm.weight": (widths[name] if every else h,) for name in ("q", "k")}
    if attention.sinks:
        found["sinks"] = (config.heads,)
    return found


def _delta_net(config: ModelConfig) -> Shapes:
    D, delta = config.width, config.attention.delta
    C, heads = {"q": delta.key_heads * delta.key_width, "v": delta.value_heads * delta.value_width}, delta.value_heads
    widths = {"q": C["q"], "k": C["q"], "v": C["v"], "gate": C["v"], "beta": heads, "decay": heads}
    return {
        **{f"{name}.weight": (width, D) for name, width in widths.items()},
        **{f"{name}_conv.weight": (widths[name], delta.kernel) for name in ("q", "k", "v")},
        "dt_bias": (heads,),
        "a_log": (heads,),
        "output_norm.weight": (delta.value_width,),
        "o.weight": (D, C["v"]),
    }


def _mla(config: ModelConfig) -> Shapes:
    D, H, mla = config.width, config.heads, config.attention.mla
    queries = H * (mla.nope_width + mla.rope_width)
    found: Shapes = {"q.weight": (queries, D)}
    if mla.q_rank is not None:
        found = {"q_down.weight": (mla.q_rank, D), "q_norm.weight": (mla.q_rank,), "q_up.weight": (queries, mla.q_rank)}
    return {
        **found,
        "kv_down.weight": (mla.kv_rank + mla.rope_width, D),
        "kv_norm.weight": (mla.kv_rank,),
        "kv_up.weight": (H * (mla.nope_width + mla.value_width), mla.kv_rank),
        "o.weight": (D, H * mla.value_width),
    }


def _moe(config: ModelConfig) -> Shapes:
    D, moe = config.width, config.moe
    E, F, P = moe.experts, moe.hidden, moe.activation.projections
    found: Shapes = {"moe.experts.gate_up": (E, P, F, D), "moe.experts.down": (E, D, F)}
    if moe.bias:
        found |= {"moe.experts.gate_up_bias": (E, P, F), "moe.experts.down_bias": (E, D)}
    if moe.shared_hidden:
        found |= _under("moe.shared", _feedforward(config, moe.shared_hidden))
    if moe.shared_hidden and moe.shared_gate:
        found["moe.shared_gate.weight"] = (1, D)
    return found | _under("moe.router", _router(config))


def _router(config: ModelConfig) -> Shapes:
    """Hash selection has none but those of constant experts; expert_bias is a buffer, since no gradient trains it."""
    router, constants = config.moe.router, config.moe.router.constant_experts
    null = {"null.mixing.weight": (2 * constants, config.width), "null.vectors.weight": (config.width, constants)}
    if router.selection is Selection.hash:
        return null if constants else {}
    outputs = config.moe.experts + router.null_experts
    found: Shapes = {"weight": (outputs, config.width)}
    if router.bias:
        found["bias"] = (outputs,)
    if router.noise:
        found["noise_weight"] = (outputs, config.width)
    return found | (null if constants else {})


def _feedforward(config: ModelConfig, hidden: int) -> Shapes:
    return {"gate_up": (config.activation.projections, hidden, config.width), "down": (config.width, hidden)}


def _prediction(config: ModelConfig, index: int) -> Shapes:
    """Returns a multi-token prediction module: its block continues the layers of the model, whose embedding and head it shares."""
    D = config.width
    found: Shapes = {f"{name}.weight": (D,) for name in ("embedding_norm", "hidden_norm", "norm")}
    found["projection.weight"] = (D, 2 * D)
    return found | _under("block", block_shapes(config, index))


def _under(prefix: str, found: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in found.items()}
