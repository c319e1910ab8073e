"""OLMoE (Muennighoff et al. 2024): queries and keys are normed over all heads together."""

from typing import Any

from ...moe.config import ModelConfig, QKNorm
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import NORMS, PROJECTIONS, QK_NORMS, ROUTER, experts, layer_tensors
from .family import (
    COMMON,
    ROUTED,
    Family,
    norm_topk_prob,
    read_attention_bias,
    read_common,
    read_experts,
    read_head_width,
    read_norm_topk_prob,
    read_router_aux_loss_coef,
    router_aux_loss_coef,
    write_common,
)


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    reader.require("head_dim", None, config.width // config.heads)
    read_olmo(reader, config)
    if reader.any("clip_qkv") is not None:
        config.attention.clip_qkv = reader.positive("clip_qkv")
    config.attention.rope = read_rope(reader)
    return config


def read_olmo(reader: ConfigReader, config: ModelConfig) -> None:
    """Reads what FlexOlmo has too: routing, heads, and norms of queries and keys."""
    read_head_width(reader, config)
    read_experts(reader, config, "num_experts", "intermediate_size")
    read_norm_topk_prob(reader, config)
    read_router_aux_loss_coef(reader, config)
    read_attention_bias(reader, config)
    config.attention.qk_norm = QKNorm.full


def write(config: ModelConfig) -> dict[str, Any]:
    return write_olmo(config) | {"clip_qkv": config.attention.clip_qkv}


def write_olmo(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys that FlexOlmo has too."""
    return write_common(config) | {
        "attention_bias": config.attention.qkv_bias,
        "intermediate_size": config.moe.hidden,
        "num_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": norm_topk_prob(config),
        "router_aux_loss_coef": router_aux_loss_coef(config),
        "rope_parameters": write_rope(config.attention.rope),
    }


OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    defaults=COMMON
    | ROUTED
    | {
        "attention_bias": False,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": None,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    },
    read=read,
    write=write,
    tensors=NORMS | PROJECTIONS | QK_NORMS | ROUTER | experts(),
)


# FlexOlmo (Shi et al. 2025, arXiv:2507.07024): OLMoE with norms after attention and experts, as OLMo 2, not before them.


def read_flex_olmo(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_olmo(reader, config)
    config.pre_norms, config.sandwich_norms = False, True
    config.attention.rope = read_rope(reader, theta=500000.0)
    return config


def write_flex_olmo(config: ModelConfig) -> dict[str, Any]:
    head_width = {"head_dim": config.head_width} if config.head_width else {}  # transformers does not take null
    return write_olmo(config) | head_width


NORMS_AFTER = layer_tensors(
    {
        "attention_post_norm.weight": "post_attention_layernorm.weight",
        "feedforward_post_norm.weight": "post_feedforward_layernorm.weight",
    }
)

FLEX_OLMO = Family(
    architecture="FlexOlmoForCausalLM",
    model_type="flex_olmo",
    defaults=COMMON
    | ROUTED
    | {
        "attention_bias": False,
        "eos_token_id": 100257,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 32,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.01,
        "vocab_size": 100352,
    },
    read=read_flex_olmo,
    write=write_flex_olmo,
    tensors=NORMS_AFTER | PROJECTIONS | QK_NORMS | ROUTER | experts(),
)
