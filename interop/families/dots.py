"""dots.llm1 (rednote-hilab 2025): routing as DeepSeek-V3, attention as Qwen3."""

from typing import Any

from ...moe.config import ModelConfig, QKNorm
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, EXPERT_BIAS, NORMS, PROJECTIONS, QK_NORMS, ROUTER, experts, feedforward
from .deepseek import read_dense_first, read_routed, read_sigmoid_routing, write_routed, write_sigmoid_routing
from .family import (
    COMMON,
    Family,
    layer_types,
    read_attention_bias,
    read_common,
    read_head_width,
    read_sliding_window,
    write_common,
)


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_routed(reader, config)
    read_dense_first(reader, config)
    read_sigmoid_routing(reader, config, "noaux_tc")  # the published file has the name of the method there
    reader.require("moe_layer_freq", None, 1)
    read_attention_bias(reader, config)
    config.attention.qk_norm = QKNorm.head
    windowed = reader.any("sliding_window") is not None
    first = 0 if reader.any("max_window_layers") is None else reader.integer("max_window_layers", 0)
    read_sliding_window(reader, config, lambda index: windowed and index >= first)
    config.attention.rope = read_rope(reader)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return (
        write_common(config)
        | write_routed(config)
        | write_sigmoid_routing(config)
        | {
            "attention_bias": config.attention.qkv_bias,
            "first_k_dense_replace": config.dense_first,
            "layer_types": layer_types(config),
            "max_window_layers": config.layers,
            "rope_parameters": write_rope(config.attention.rope),
            "sliding_window": config.attention.window,
            **({"head_dim": head_width(config)} if config.head_width else {}),  # transformers does not take null
        }
    )


DOTS1 = Family(
    architecture="Dots1ForCausalLM",
    model_type="dots1",
    defaults=COMMON
    | {
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "hidden_size": 4608,
        "intermediate_size": 10944,
        "layer_types": None,
        "max_position_embeddings": 2048,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "norm_topk_prob": False,
        "num_attention_heads": 32,
        "num_experts_per_tok": None,
        "num_hidden_layers": 62,
        "num_key_value_heads": 32,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 1.0,
        "sliding_window": 4096,
        "topk_group": 1,
        "vocab_size": 152064,
    },
    read=read,
    write=write,
    tensors=NORMS
    | PROJECTIONS
    | QK_NORMS
    | DENSE
    | ROUTER
    | EXPERT_BIAS
    | experts()
    | feedforward("moe.shared", "mlp.shared_experts"),
    irrelevant=frozenset(("ep_size", "aux_loss_alpha", "seq_aux")),
    preset="dots_llm1",
)
