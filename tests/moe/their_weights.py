"""Our parameters from those of a transformers model.

Import it as `their_weights`: tests/conftest.py puts this folder on the path.
"""

from typing import Any

import torch
from torch import Tensor

OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
ATTENTION = {"q_down": "q_a_proj", "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm"}
ATTENTION |= {"kv_up": "kv_b_proj", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def their_value(theirs: Any, name: str, used: set[str]) -> Tensor:
    """Returns our parameter `name` from theirs, and adds their names to `used`."""

    def get(path: str) -> Tensor:
        used.add(path)
        return theirs.get_parameter(path).detach()

    if name in OUTSIDE:
        return get(OUTSIDE[name]) + (theirs.config.model_type == "gemma2" and name == "norm.weight")
    _, index, rest = name.split(".", 2)
    layer = f"model.layers.{index}."
    part, _, last = rest.partition(".")
    if part.endswith("norm"):
        return get(layer + their_norm(theirs, part)) + (theirs.config.model_type == "gemma2")
    if part == "attention":
        module, _, kind = last.partition(".")
        if module == "q_norm" and theirs.config.model_type == "deepseek_v2":
            module = "q_a_layernorm"
        return get(f"{layer}self_attn.{ATTENTION.get(module, module)}" + (f".{kind}" if kind else ""))
    return their_feedforward(get, layer + "mlp.", last if part == "moe" else rest)


def their_norm(theirs: Any, part: str) -> str:
    names = {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
    if theirs.config.model_type == "gemma2":
        names |= {"feedforward_norm": "pre_feedforward_layernorm", "attention_post_norm": "post_attention_layernorm"}
        names |= {"feedforward_post_norm": "post_feedforward_layernorm"}
    return names[part] + ".weight"


def their_feedforward(get: Any, mlp: str, name: str) -> Tensor:
    """`name` begins with router, experts, shared or shared_gate in an MoE layer, with dense in a dense one."""
    oss = gpt_oss_experts(get, mlp) if name.startswith(("experts", "router")) else {}
    if name in oss:
        return oss[name]
    match name:
        case "router.weight":
            return get(mlp + "gate.weight")
        case "experts.gate_up":
            return get(mlp + "experts.gate_up_proj").unflatten(1, (2, -1))
        case "experts.down":
            return get(mlp + "experts.down_proj")
        case "shared_gate.weight":
            return get(mlp + "shared_expert_gate.weight")
    dense = mlp if name.startswith("dense") else mlp + shared_name(get, mlp)
    if name.endswith("down"):
        return get(dense + "down_proj.weight")
    return torch.stack([get(dense + "gate_proj.weight"), get(dense + "up_proj.weight")])


def shared_name(get: Any, mlp: str) -> str:
    try:
        get(mlp + "shared_expert.up_proj.weight")
    except AttributeError:
        return "shared_experts."
    return "shared_expert."


def gpt_oss_experts(get: Any, mlp: str) -> dict[str, Tensor]:
    """gpt-oss interleaves gate and up in one dimension, and transposes the weights."""
    try:
        router = get(mlp + "router.weight")
    except AttributeError:
        return {}
    return {
        "router.weight": router,
        "experts.gate_up": get(mlp + "experts.gate_up_proj").unflatten(-1, (-1, 2)).permute(0, 3, 2, 1),
        "experts.gate_up_bias": get(mlp + "experts.gate_up_proj_bias").unflatten(-1, (-1, 2)).transpose(1, 2),
        "experts.down": get(mlp + "experts.down_proj").transpose(1, 2),
        "experts.down_bias": get(mlp + "experts.down_proj_bias"),
    }
