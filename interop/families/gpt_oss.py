"""gpt-oss (OpenAI 2025) in bf16: biases, attention sinks, alternating windows, fused experts that interleave gate and up."""

from typing import TYPE_CHECKING, Any

from ...moe.config import Activation, ModelConfig
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import NORMS, PROJECTIONS, Source, StoredForms, layer_tensors
from .family import (
    COMMON,
    ROUTED,
    Family,
    layer_types,
    read_attention_bias,
    read_common,
    read_experts,
    read_head_width,
    read_router_aux_loss_coef,
    read_sliding_window,
    router_aux_loss_coef,
    write_common,
)

if TYPE_CHECKING:
    from torch import Tensor


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader)
    read_head_width(reader, config)
    read_experts(reader, config, "num_local_experts", "intermediate_size")
    reader.require("experts_per_token", None, config.moe.top_k)
    read_router_aux_loss_coef(reader, config)
    config.moe.activation, config.moe.bias = Activation.swiglu_clamped, True
    reader.require("swiglu_alpha", 1.702)
    reader.require("swiglu_limit", 7)
    config.moe.router.softmax_after_top_k = config.moe.router.bias = True
    read_attention_bias(reader, config)
    config.attention.sinks = True
    read_sliding_window(reader, config, lambda index: index % 2 == 0)
    config.attention.rope = read_rope(reader, theta=150000.0, default=ROPE)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return write_common(config) | {
        "attention_bias": config.attention.qkv_bias,
        "head_dim": head_width(config),
        "intermediate_size": config.moe.hidden,
        "num_local_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": router_aux_loss_coef(config),
        "sliding_window": config.attention.window or 128,  # transformers asks for one even if no layer uses it
        "layer_types": layer_types(config),
        "rope_parameters": write_rope(config.attention.rope),
    }


def interleaved(gate_up_EPFD: "Tensor") -> "Tensor":
    """(E, P, F, D) as (E, D, F, P): the gate and up weights of each hidden unit are neighbours."""
    return gate_up_EPFD.permute(0, 3, 2, 1)


def transposed(tensor: "Tensor") -> "Tensor":
    return tensor.mT


ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""rope_parameters, where they are left out or null."""
EXPERTS = "model.layers.{layer}.mlp.experts"
TENSORS: dict[str, StoredForms] = {
    "moe.experts.gate_up": ((Source(f"{EXPERTS}.gate_up_proj", interleaved, joined=2),),),
    "moe.experts.gate_up_bias": ((Source(f"{EXPERTS}.gate_up_proj_bias", transposed, joined=1),),),
    "moe.experts.down": ((Source(f"{EXPERTS}.down_proj", transposed),),),
    "moe.experts.down_bias": ((Source(f"{EXPERTS}.down_proj_bias"),),),
}

GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    defaults=COMMON
    | ROUTED
    | {
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": None,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": ROPE,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    read=read,
    write=write,
    tensors=NORMS
    | PROJECTIONS
    | TENSORS
    | layer_tensors(
        {
            "attention.sinks": "self_attn.sinks",
            "moe.router.weight": "mlp.router.weight",
            "moe.router.bias": "mlp.router.bias",
        }
    ),
    irrelevant=frozenset(("initial_context_length",)),  # rope_scaling has it too
)
