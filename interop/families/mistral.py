"""Mistral (dense): Llama with a window."""

from typing import Any

from ...moe.config import ModelConfig
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, NORMS, PROJECTIONS
from .family import COMMON, Family, read_common, read_head_width, write_common


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
