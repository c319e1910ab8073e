"""Llama (dense)."""

from typing import Any

from ...moe.config import ModelConfig
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, NORMS, PROJECTIONS
from .family import COMMON, Family, read_attention_bias, read_common, read_head_width, write_common


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_attention_bias(reader, config)
    reader.require("mlp_bias", None, False)
    config.attention.rope = read_rope(reader)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return write_common(config) | {
        "attention_bias": config.attention.qkv_bias,
        "head_dim": head_width(config),
        "rope_parameters": write_rope(config.attention.rope),
    }


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults=COMMON
    | {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32000,
    },
    read=read,
    write=write,
    tensors=NORMS | PROJECTIONS | DENSE,
)
