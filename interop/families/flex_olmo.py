"""FlexOlmo (Shi et al. 2025, arXiv:2507.07024): OLMoE with norms after attention and experts, as OLMo 2, not before them."""

from typing import Any

from ...moe.config import ModelConfig
from ..config_reader import ConfigReader
from ..rope import read_rope
from ..weight_mapping import PROJECTIONS, QK_NORMS, ROUTER, experts, layer_tensors
from .family import COMMON, ROUTED, Family, read_common
from .olmoe import read_olmo, write_olmo


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_olmo(reader, config)
    config.pre_norms, config.sandwich_norms = False, True
    config.attention.rope = read_rope(reader, theta=500000.0)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
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
    read=read,
    write=write,
    tensors=NORMS_AFTER | PROJECTIONS | QK_NORMS | ROUTER | experts(),
)
