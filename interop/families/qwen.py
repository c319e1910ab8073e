"""Qwen2-MoE (Qwen1.5-MoE too) and Qwen3-MoE, and the dense Qwen2 (Qwen2.5 too) and Qwen3."""

from typing import Any

from ...moe.config import ModelConfig, QKNorm
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, NORMS, PROJECTIONS, QK_NORMS, ROUTER, experts, feedforward, layer_tensors
from .family import (
    COMMON,
    ROUTED,
    Family,
    layer_types,
    norm_topk_prob,
    read_attention_bias,
    read_common,
    read_experts,
    read_head_width,
    read_moe_layers,
    read_norm_topk_prob,
    read_router_aux_loss_coef,
    read_sliding_window,
    router_aux_loss_coef,
    write_common,
    write_moe_layers,
)


def read_qwen2_moe(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    _read_routing(reader, config, "num_experts")
    config.moe.shared_hidden, config.moe.shared_gate = reader.integer("shared_expert_intermediate_size", 0), True
    config.attention.qkv_bias = reader.flag("qkv_bias")
    used, windowed = reader.flag("use_sliding_window"), reader.integer("max_window_layers", 0)
    read_sliding_window(reader, config, lambda index: used and index % 2 == 0 and index < windowed)
    config.attention.rope = read_rope(reader)
    return config


def read_qwen3_moe(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    _read_routing(reader, config, "num_local_experts" if reader.given("num_local_experts") else "num_experts")
    _read_qwen3_attention(reader, config)
    used = reader.flag("use_sliding_window")
    read_sliding_window(reader, config, lambda index: used)
    return config


def read_qwen3(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    _read_qwen3_attention(reader, config)
    used, first = reader.flag("use_sliding_window"), reader.integer("max_window_layers", 0)
    read_sliding_window(reader, config, lambda index: used and index >= first)
    return config


def read_qwen2(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    config.attention.qkv_bias = True
    used, first = reader.flag("use_sliding_window"), reader.integer("max_window_layers", 0)
    read_sliding_window(reader, config, lambda index: used and index >= first)
    config.attention.rope = read_rope(reader)
    return config


def write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return (
        write_common(config)
        | _routing(config)
        | _windows(config, none=0, bound=config.layers)
        | {
            "num_experts": config.moe.experts,
            "shared_expert_intermediate_size": config.moe.shared_hidden,
            "qkv_bias": config.attention.qkv_bias,
            "rope_parameters": write_rope(config.attention.rope),
            **({"head_dim": config.head_width} if config.head_width else {}),  # transformers does not take null
        }
    )


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    window = config.attention.window
    return (
        write_common(config)
        | _routing(config)
        | _qwen3_attention(config)
        | {
            "num_experts": config.moe.experts,
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }
    )


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return write_common(config) | _qwen3_attention(config) | _windows(config, none=None, bound=0)


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return (
        write_common(config)
        | _windows(config, none=None, bound=0)
        | {
            "rope_parameters": write_rope(config.attention.rope),
            **({"head_dim": config.head_width} if config.head_width else {}),  # transformers does not take null
        }
    )


def _read_routing(reader: ConfigReader, config: ModelConfig, experts: str) -> None:
    read_experts(reader, config, experts, "moe_intermediate_size")
    read_norm_topk_prob(reader, config)
    read_router_aux_loss_coef(reader, config)
    read_moe_layers(reader, config)


def _routing(config: ModelConfig) -> dict[str, Any]:
    return write_moe_layers(config) | {
        "moe_intermediate_size": config.moe.hidden,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": norm_topk_prob(config),
        "router_aux_loss_coef": router_aux_loss_coef(config),
    }


def _read_qwen3_attention(reader: ConfigReader, config: ModelConfig) -> None:
    read_attention_bias(reader, config)
    config.attention.qk_norm = QKNorm.head
    config.attention.rope = read_rope(reader)


def _qwen3_attention(config: ModelConfig) -> dict[str, Any]:
    return {
        "head_dim": head_width(config),
        "attention_bias": config.attention.qkv_bias,
        "rope_parameters": write_rope(config.attention.rope),
    }


def _windows(config: ModelConfig, none: int | None, bound: int) -> dict[str, Any]:
    """Keys of the window. `none`: what transformers writes if no layer has one; `bound`: max_window_layers if some layers have."""
    window = config.attention.window
    types = {"use_sliding_window": window is not None, "sliding_window": window or none, "layer_types": layer_types(config)}
    return types if window is None else types | {"max_window_layers": bound}


QWEN: dict[str, Any] = COMMON | {
    "hidden_size": 2048,
    "max_position_embeddings": 32768,
    "num_hidden_layers": 24,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_MOE: dict[str, Any] = QWEN | ROUTED | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}

QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    defaults=QWEN_MOE
    | {
        "intermediate_size": 5632,
        "layer_types": None,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    },
    read=read_qwen2_moe,
    write=write_qwen2_moe,
    tensors=NORMS
    | PROJECTIONS
    | DENSE
    | ROUTER
    | experts()
    | feedforward("moe.shared", "mlp.shared_expert")
    | layer_tensors({"moe.shared_gate.weight": "mlp.shared_expert_gate.weight"}),
    left_out=r"model\.layers\.\d+\.mlp\.shared_expert_gate\.weight",  # of a shared expert of width 0
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults=QWEN_MOE
    | {
        "attention_bias": False,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    },
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    tensors=NORMS | PROJECTIONS | QK_NORMS | DENSE | ROUTER | experts(),
    irrelevant=frozenset(("max_window_layers",)),  # transformers gives the window to all layers or none
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults=QWEN
    | {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "layer_types": None,
        "max_window_layers": 28,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    read=read_qwen3,
    write=write_qwen3,
    tensors=NORMS | PROJECTIONS | QK_NORMS | DENSE,
)

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults={key: value for key, value in QWEN3.defaults.items() if key not in ("attention_bias", "head_dim")},
    read=read_qwen2,
    write=write_qwen2,
    tensors=NORMS | PROJECTIONS | DENSE,
)
