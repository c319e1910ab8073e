"""MiniMax-M2 (2025): sigmoid scores with an expert bias, queries and keys normed over all heads, a part of each head rotated."""

from typing import Any

from ...moe.config import ModelConfig, QKNorm, Score
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import Partial, read_rope, write_rope
from ..weight_mapping import NORMS, PROJECTIONS, QK_NORMS, ROUTER, Source, experts
from .family import (
    COMMON,
    ROUTED,
    Family,
    normalize_top_k,
    read_common,
    read_experts,
    read_head_width,
    read_router_aux_loss_coef,
    router_aux_loss_coef,
    write_common,
)


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_experts(reader, config, "num_local_experts", "intermediate_size")
    reader.require("scoring_func", None, "sigmoid")
    reader.require("use_routing_bias", None, True)
    config.moe.router.score = Score.sigmoid
    normalize_top_k(config, True)
    read_router_aux_loss_coef(reader, config)
    config.moe.balance.bias_rate = 0.001
    reader.require("router_jitter_noise", 0, why="there it reaches the experts too, not the router alone")
    if any(kind != 1 for kind in reader.any("attn_type_list") or []):
        raise reader.wrong("attn_type_list", "must be 1, softmax attention, for each layer")
    reader.require("qk_norm_type", None, "per_layer")
    config.attention.qk_norm = QKNorm.full
    width, rotated = head_width(config), reader.optional_integer("rotary_dim")
    config.attention.rope = read_rope(reader, theta=5e6, partial=Partial(width, None if rotated is None else rotated / width))
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return write_common(config) | {
        "head_dim": head_width(config),
        "intermediate_size": config.moe.hidden,
        "num_local_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": router_aux_loss_coef(config),
        "rope_parameters": write_rope(config.attention.rope),
    }


MINIMAX_M2 = Family(
    architecture="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    defaults=COMMON
    | ROUTED
    | {
        "bos_token_id": 200034,
        "eos_token_id": 200020,
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "max_position_embeddings": 196608,
        "num_attention_heads": 48,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 62,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "rms_norm_eps": 1e-6,
        "router_jitter_noise": 0.0,
        "vocab_size": 200064,
    },
    read=read,
    write=write,
    tensors=NORMS
    | PROJECTIONS
    | QK_NORMS
    | {
        "moe.router.weight": (
            (Source("model.layers.{layer}.block_sparse_moe.gate.weight"),),
            *ROUTER["moe.router.weight"],
        ),
        "moe.router.expert_bias": (
            (Source("model.layers.{layer}.block_sparse_moe.e_score_correction_bias"),),
            (Source("model.layers.{layer}.mlp.e_score_correction_bias"),),
        ),
    }
    | experts("block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")),
    irrelevant=frozenset(("mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules", "use_mtp", "shared_moe_mode")),
)
