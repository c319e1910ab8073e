"""Granite 3.0 and 3.1 MoE, PowerMoE (IBM 2024): Mixtral with factors of embedding, residual branches, attention and logits."""

from typing import Any

from ...moe.config import ModelConfig
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import NORMS, PROJECTIONS, Source, StoredForms
from .family import (
    COMMON,
    ROUTED,
    Family,
    read_attention_bias,
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
    config.moe.router.softmax_after_top_k = True
    read_router_aux_loss_coef(reader, config)
    read_attention_bias(reader, config)
    config.embedding_multiplier = reader.positive("embedding_multiplier")
    config.residual_multiplier = reader.positive("residual_multiplier")
    config.output_multiplier = 1 / reader.positive("logits_scaling")
    config.attention.scale = reader.positive("attention_multiplier")
    config.attention.rope = read_rope(reader)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    return write_common(config) | {
        "attention_bias": attention.qkv_bias,
        "attention_multiplier": attention.scale or head_width(config) ** -0.5,
        "embedding_multiplier": config.embedding_multiplier,
        "intermediate_size": config.moe.hidden,
        "logits_scaling": _inverse(config.output_multiplier),
        "num_experts_per_tok": config.moe.top_k,
        "num_local_experts": config.moe.experts,
        "residual_multiplier": config.residual_multiplier,
        "rope_parameters": write_rope(attention.rope),
        "router_aux_loss_coef": router_aux_loss_coef(config),
        **({"head_dim": config.head_width} if config.head_width else {}),  # transformers does not take null
    }


def _inverse(number: float) -> float:
    """1 / number, of several floats with that inverse the shortest: 6.0, not 5.999999999999999."""
    short = (float(f"{1 / number:.{digits}g}") for digits in range(1, 18))
    return next((each for each in short if each and 1 / each == number), 1 / number)


MOE = "model.layers.{layer}.block_sparse_moe"
TENSORS: dict[str, StoredForms] = {
    "moe.router.weight": ((Source(f"{MOE}.router.layer.weight"),), (Source(f"{MOE}.router.weight"),)),
    "moe.experts.gate_up": (
        (Source(f"{MOE}.input_linear.weight", joined=1),),
        (Source(f"{MOE}.experts.gate_up_proj", joined=1),),
    ),
    "moe.experts.down": ((Source(f"{MOE}.output_linear.weight"),), (Source(f"{MOE}.experts.down_proj"),)),
}

GRANITE_MOE = Family(
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    defaults=COMMON
    | ROUTED
    | {
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "bos_token_id": 1,
        "embedding_multiplier": 1.0,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "logits_scaling": 1.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "num_local_experts": 8,
        "residual_multiplier": 1.0,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32000,
    },
    read=read,
    write=write,
    tensors=NORMS | PROJECTIONS | TENSORS,
)
