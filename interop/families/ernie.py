"""ERNIE-4.5-MoE (Baidu 2025), text models: softmax scores chosen with an expert bias, neighbouring dimensions rotated."""

from typing import TYPE_CHECKING, Any

from ...moe.config import ModelConfig
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, NORMS, PROJECTIONS, ROUTER, Source, experts, feedforward
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
    set_moe_layers,
    write_common,
)

if TYPE_CHECKING:
    from torch import Tensor


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    reader.require("use_bias", None, False)
    read_experts(reader, config, "moe_num_experts", "moe_intermediate_size", top_k="moe_k")
    config.moe.shared_hidden = reader.integer("moe_num_shared_experts", 0) * config.moe.hidden
    normalize_top_k(config, True)
    if not 0 < reader.number("moe_norm_min") <= 1e-12:
        raise reader.wrong("moe_norm_min", "must be above 0 and at most 1e-12, which no sum of scores reaches")
    first, last = reader.integer("moe_layer_start_index", 0), reader.integer("moe_layer_end_index", -1)
    every, last = reader.integer("moe_layer_interval"), config.layers - 1 if last == -1 else last
    set_moe_layers(config, [(index + 1) % every == 0 and first <= index <= last for index in range(config.layers)], every)
    read_router_aux_loss_coef(reader, config)
    config.moe.balance.bias_rate = 0.001
    config.attention.rope = read_rope(reader, theta=500000.0, interleaved=True)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    sparse = [index for index in range(config.layers) if config.moe_layer(index)]
    return write_common(config) | {
        "moe_num_experts": config.moe.experts,
        "moe_k": config.moe.top_k,
        "moe_intermediate_size": config.moe.hidden,
        "moe_num_shared_experts": config.moe.shared_hidden // config.moe.hidden,
        "moe_layer_start_index": sparse[0] if sparse else config.layers,
        "moe_layer_end_index": sparse[-1] if sparse else config.layers - 1,
        "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        "router_aux_loss_coef": router_aux_loss_coef(config),
        "rope_parameters": write_rope(config.attention.rope),
        **({"head_dim": config.head_width} if config.head_width else {}),  # transformers does not take null
    }


def one_row(bias_E: "Tensor") -> "Tensor":
    """(E,) as (1, E)."""
    return bias_E.unsqueeze(0)


ERNIE4_5_MOE = Family(
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    defaults={key: value for key, value in COMMON.items() if key != "attention_dropout"}
    | ROUTED
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_norm_min": 1e-12,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
        "vocab_size": 103424,
    },
    read=read,
    write=write,
    tensors=NORMS
    | PROJECTIONS
    | DENSE
    | ROUTER
    | experts()
    | feedforward("moe.shared", "mlp.shared_experts")
    | {
        "moe.router.expert_bias": (
            (Source("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias", one_row),),
            (Source("model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias", one_row),),
        )
    },
    irrelevant=frozenset(("moe_capacity", "moe_gate", "moe_use_aux_free", "num_nextn_predict_layers")),  # of its training
    left_out=r"model\.mtp_.+",  # its prediction module, which transformers leaves out too
)
