"""Mistral (dense): Llama with a window; and Mixtral (Jiang et al. 2024)."""

from typing import Any

from ...moe.config import ModelConfig, RopeScaling
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, NORMS, PROJECTIONS, ROUTER, Source, experts
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
    config.attention.window = reader.optional_integer("sliding_window")
    config.attention.rope = read_rope(reader)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return write_common(config) | {
        "head_dim": head_width(config),
        "sliding_window": config.attention.window,
        "rope_parameters": write_rope(config.attention.rope),
    }


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults=COMMON
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    read=read,
    write=write,
    tensors=NORMS | PROJECTIONS | DENSE,
)


def read_mixtral(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_experts(reader, config, "num_local_experts", "intermediate_size")
    normalize_top_k(config, True)
    read_router_aux_loss_coef(reader, config)
    reader.require("router_jitter_noise", 0, why="there it reaches the experts too, not the router alone")
    config.attention.window = reader.optional_integer("sliding_window")
    config.attention.rope = read_rope(reader, theta=1e6)
    return config


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    said = config.attention.rope.scaling in (RopeScaling.yarn, RopeScaling.dynamic, RopeScaling.longrope)
    return write_common(config) | {
        "head_dim": head_width(config) if said else config.head_width,  # with these, transformers does not take null
        "intermediate_size": config.moe.hidden,
        "num_local_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": router_aux_loss_coef(config),
        "sliding_window": config.attention.window,
        "rope_parameters": write_rope(config.attention.rope),
    }


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    defaults=COMMON
    | ROUTED
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    read=read_mixtral,
    write=write_mixtral,
    tensors=NORMS
    | PROJECTIONS
    | {
        "moe.router.weight": (
            (Source("model.layers.{layer}.block_sparse_moe.gate.weight"),),
            *ROUTER["moe.router.weight"],
        )
    }
    | experts("block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")),
)
