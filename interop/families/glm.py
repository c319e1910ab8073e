"""GLM-4.5 and GLM-4.6 (Zhipu 2025): routing as DeepSeek-V3, grouped-query attention that rotates a part of each head; and
GLM-4.7-Flash (Z.ai 2026): DeepSeek-V3's attention too.
"""

from typing import Any

from ...moe.config import ModelConfig, QKNorm
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import Partial, read_rope, write_rope
from ..weight_mapping import DENSE, EXPERT_BIAS, NORMS, PROJECTIONS, QK_NORMS, ROUTER, experts, feedforward
from .deepseek import (
    LATENT,
    LATENT_TENSORS,
    read_dense_first,
    read_latent,
    read_prediction,
    read_routed,
    read_sigmoid_routing,
    write_latent,
    write_routed,
    write_sigmoid_routing,
)
from .family import COMMON, Family, read_common, read_head_width, set_moe_layers, write_common


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_routed(reader, config)
    read_dense_first(reader, config)
    read_sigmoid_routing(reader, config)
    reader.require("moe_layer_freq", None, 1)
    attention = config.attention
    attention.qkv_bias = reader.flag("attention_bias")
    attention.qk_norm = QKNorm.head if reader.flag("use_qk_norm") else QKNorm.none
    attention.rope = read_rope(reader, partial=Partial(head_width(config), 0.5))
    read_prediction(reader, config)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    return (
        write_common(config)
        | write_routed(config)
        | write_sigmoid_routing(config)
        | {
            "first_k_dense_replace": config.dense_first,
            "attention_bias": attention.qkv_bias,
            "use_qk_norm": attention.qk_norm is QKNorm.head,
            "rope_parameters": write_rope(attention.rope) | {"partial_rotary_factor": attention.rope.fraction},
            "num_nextn_predict_layers": config.mtp_depth,
            **({"head_dim": config.head_width} if config.head_width else {}),  # transformers does not take null
        }
    )


def read_lite(reader: ConfigReader) -> ModelConfig:
    config = read_latent(reader, interleaved=reader.flag("rope_interleave"))
    read_sigmoid_routing(reader, config)
    kinds = reader.any("mlp_layer_types")
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (config.layers - 1)
    if not isinstance(kinds, list) or len(kinds) != config.layers or not all(kind in ("dense", "sparse") for kind in kinds):
        raise reader.wrong("mlp_layer_types", f"must be {config.layers} times dense or sparse")
    set_moe_layers(config, [kind == "sparse" for kind in kinds])
    reader.require("first_k_dense_replace", None, config.dense_first if config.dense_first < config.layers else len(kinds))
    read_prediction(reader, config)
    return config


def write_lite(config: ModelConfig) -> dict[str, Any]:
    kinds = ["sparse" if config.moe_layer(index) else "dense" for index in range(config.layers)]
    return (
        write_latent(config)
        | write_sigmoid_routing(config)
        | {
            "mlp_layer_types": kinds,
            "rope_interleave": config.attention.rope.interleaved,
            **({"num_nextn_predict_layers": config.mtp_depth} if config.mtp_depth else {}),
        }
    )


GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    defaults=COMMON
    | {
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 151552,
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
    preset="glm_4_5",
)

GLM4_MOE_LITE = Family(
    architecture="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    defaults=LATENT
    | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "max_position_embeddings": 202752,
        "mlp_layer_types": None,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 20,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 47,
        "num_key_value_heads": 20,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "topk_group": 1,
        "v_head_dim": 256,
        "vocab_size": 154880,
    },
    read=read_lite,
    write=write_lite,
    tensors=LATENT_TENSORS | EXPERT_BIAS,
    irrelevant=frozenset(("ep_size", "aux_loss_alpha", "seq_aux")),
    preset="glm_4_7_flash",
)
