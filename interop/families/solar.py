"""Solar-Open (Upstage 2026): routing as DeepSeek-V3 in every layer, attention as Llama."""

from typing import Any

from ...moe.config import ModelConfig
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import EXPERT_BIAS, NORMS, PROJECTIONS, ROUTER, experts, feedforward
from .deepseek import read_routed, read_sigmoid_routing, write_routed, write_sigmoid_routing
from .family import COMMON, Family, read_common, read_head_width, write_common


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_routed(reader, config)
    read_sigmoid_routing(reader, config)
    reader.require("first_k_dense_replace", None, 0)
    config.attention.qkv_bias = reader.flag("attention_bias")
    config.attention.rope = read_rope(reader, theta=1e6)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return (
        write_common(config)
        | write_routed(config)
        | write_sigmoid_routing(config)
        | {
            "attention_bias": config.attention.qkv_bias,
            "head_dim": head_width(config),
            "rope_parameters": write_rope(config.attention.rope),
        }
    )


SOLAR_OPEN = Family(
    architecture="SolarOpenForCausalLM",
    model_type="solar_open",
    defaults=COMMON
    | {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10240,  # of dense layers, which there are none of
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1280,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "vocab_size": 196608,
    },
    read=read,
    write=write,
    tensors=NORMS | PROJECTIONS | ROUTER | EXPERT_BIAS | experts() | feedforward("moe.shared", "mlp.shared_experts"),
    irrelevant=frozenset(("ep_size", "aux_loss_alpha", "seq_aux")),
    preset="solar_open_100b",
)
