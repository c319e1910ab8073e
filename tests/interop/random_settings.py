"""Random settings of tiny transformers models: valid combinations of the keys that each family's configuration has."""

import random
from collections.abc import Callable
from typing import Any

from family_cases import CASES

Draw = random.Random
RARE = 0.04
"""Of a setting that the import refuses: the chance that a case has it."""


def some(draw: Draw, chance: float = 0.5) -> bool:
    return draw.random() < chance


def common(draw: Draw, head_width: str | None = "head_dim") -> dict[str, Any]:
    """Keys of all families. `head_width`: the key of the head width; None: it is hidden_size / num_attention_heads."""
    heads, width = draw.choice((1, 2, 3, 4, 6)), draw.choice((4, 6, 8, 12, 16))
    settings: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([number for number in range(1, heads + 1) if heads % number == 0]),
        "hidden_size": heads * width,
        "intermediate_size": draw.randint(5, 48),
        "num_hidden_layers": draw.randint(1, 4),
        "vocab_size": draw.randint(40, 90),
        "rms_norm_eps": draw.choice((1e-6, 1e-5, 1e-3, 0.1)),
        "tie_word_embeddings": some(draw),
        "max_position_embeddings": draw.choice((16, 64)),
    }
    if head_width is not None and some(draw, 0.7):
        settings |= {head_width: width, "hidden_size": draw.choice((10, 24, 32, 35, 48))}
    if some(draw, RARE):
        settings["hidden_act"] = draw.choice(("gelu", "relu"))
    return settings


def rope(draw: Draw, fraction: bool = False, mscale: bool = True) -> dict[str, Any]:
    """rope_parameters, often left out. `fraction`: the family may rotate a part of each head; `mscale`: as DeepSeek has them."""
    if some(draw, 0.3):
        return {}
    length = draw.choice((8, 16, 64))
    made: dict[str, Any] = {"rope_theta": round(10 ** draw.uniform(1, 6), 2)}
    match draw.choices(("default", "linear", "yarn", "llama3", "dynamic", "longrope"), (4, 2, 5, 2, 1, 1))[0]:
        case "linear":
            made |= {"rope_type": "linear", "factor": draw.choice((1.0, 2.0, 3.5))}
        case "yarn":
            made |= {"rope_type": "yarn", "factor": draw.choice((1.0, 2.0, 4.0, 40.0)), "original_max_position_embeddings": length}
            choices = {
                "beta_fast": draw.choice((32.0, 8.0, 16)),
                "beta_slow": draw.choice((1.0, 2, 0.5)),
                "attention_factor": draw.uniform(0.5, 1.5),
                "truncate": some(draw),
            }
            made |= {key: value for key, value in choices.items() if some(draw, 0.4)}
            if mscale and some(draw):
                made |= {"mscale": draw.uniform(0.5, 1.5), "mscale_all_dim": draw.uniform(0.5, 1.5)}
        case "llama3":
            low = draw.uniform(0.5, 2)
            made |= {"rope_type": "llama3", "factor": draw.choice((2.0, 8.0)), "original_max_position_embeddings": length}
            made |= {"low_freq_factor": low, "high_freq_factor": low + draw.uniform(0.5, 4)}
        case "dynamic":
            made |= {"rope_type": "dynamic", "factor": 2.0}
        case "longrope":
            made |= {"rope_type": "longrope", "factor": draw.choice((1.0, 2.0)), "original_max_position_embeddings": length}
        case _:
            made["rope_type"] = "default"
    if fraction and some(draw, 0.6):
        made["partial_rotary_factor"] = draw.choice((0.25, 0.5, 0.75, 1.0))
    return {"rope_parameters": made}


def routed(draw: Draw, experts: str, hidden: str = "moe_intermediate_size", top_k: str = "num_experts_per_tok") -> dict[str, Any]:
    """Number, width and choice of the experts."""
    number = draw.randint(2, 9)
    return {experts: number, top_k: draw.randint(1, number), hidden: draw.randint(5, 40)}


def grouped(draw: Draw) -> dict[str, Any]:
    """Experts in groups, of which some are chosen, and what DeepSeek's families have beside them."""
    groups, size = draw.choice((1, 1, 2, 4)), draw.randint(2, 4)
    chosen = draw.randint(1, groups)
    return {
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": chosen,
        "num_experts_per_tok": draw.randint(1, chosen * size),
        "norm_topk_prob": some(draw),
        "moe_intermediate_size": draw.randint(5, 40),
        "n_shared_experts": draw.randint(0, 2),
        "first_k_dense_replace": draw.randint(0, 3),
        "routed_scaling_factor": draw.choice((1.0, 2.5, 16.0)),
    }


def layer_types(draw: Draw, settings: dict[str, Any]) -> dict[str, Any]:
    """A window in any set of layers."""
    types = [f"{draw.choice(('sliding', 'full'))}_attention" for _ in range(settings["num_hidden_layers"])]
    return {"layer_types": types, "sliding_window": draw.randint(1, 9)}


def qwen_windows(draw: Draw, settings: dict[str, Any]) -> dict[str, Any]:
    """`use_sliding_window`, and by which key layers have the window."""
    if some(draw, 0.4):
        return {}
    used = {"use_sliding_window": True, "sliding_window": draw.randint(1, 9), "max_window_layers": draw.randint(0, 4)}
    return used | layer_types(draw, settings) if some(draw, 0.4) else used


def attention_bias(draw: Draw) -> dict[str, Any]:
    return {"attention_bias": some(draw)}


def latent(draw: Draw) -> dict[str, Any]:
    """Multi-head latent attention."""
    settings = common(draw, None)
    return settings | {
        "num_key_value_heads": settings["num_attention_heads"],
        "hidden_size": draw.choice((10, 24, 32, 35)),
        "kv_lora_rank": draw.randint(4, 20),
        "q_lora_rank": draw.choice((None, 8, 13)),
        "qk_rope_head_dim": draw.choice((2, 4, 6, 8)),
        "qk_nope_head_dim": draw.randint(1, 12),
        "v_head_dim": draw.randint(1, 12),
        "attention_bias": some(draw, RARE),
    }


def mixtral(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | routed(draw, "num_local_experts", "intermediate_size") | rope(draw)
    return settings | {
        "sliding_window": draw.choice((None, draw.randint(1, 9))),
        "router_jitter_noise": 0.1 if some(draw, RARE) else 0.0,
    }


def qwen_moe(draw: Draw) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE share."""
    settings = common(draw) | routed(draw, "num_experts") | rope(draw)
    return settings | {
        "norm_topk_prob": some(draw),
        "decoder_sparse_step": draw.choice((1, 1, 2, 3)),
        "mlp_only_layers": [layer for layer in range(settings["num_hidden_layers"]) if some(draw, 0.25)],
    }


def qwen2_moe(draw: Draw) -> dict[str, Any]:
    settings = qwen_moe(draw)
    shared = {"shared_expert_intermediate_size": draw.choice((0, 7, 16, 32)), "qkv_bias": some(draw)}
    return settings | qwen_windows(draw, settings) | shared


def qwen3_moe(draw: Draw) -> dict[str, Any]:
    settings = qwen_moe(draw) | attention_bias(draw)
    return settings | ({"use_sliding_window": True, "sliding_window": draw.randint(1, 9)} if some(draw) else {})


def deepseek_v2(draw: Draw) -> dict[str, Any]:
    settings = latent(draw) | grouped(draw) | rope(draw) | {"norm_topk_prob": some(draw, RARE)}
    settings["hidden_size"] += -settings["hidden_size"] % settings["num_attention_heads"]
    for key in ("qk_nope_head_dim", "kv_lora_rank"):  # transformers reads pairs of neighbours behind them as complex numbers
        settings[key] += settings[key] % 2
    return settings | {"topk_method": "greedy" if settings["n_group"] == 1 else "group_limited_greedy"}


def deepseek_v3(draw: Draw) -> dict[str, Any]:
    return latent(draw) | grouped(draw) | rope(draw) | {"rope_interleave": some(draw)}


def gpt_oss(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | routed(draw, "num_local_experts", "intermediate_size") | rope(draw) | attention_bias(draw)
    settings |= {"sliding_window": draw.randint(1, 9), "head_dim": draw.choice((4, 8, 12))}
    return settings | (layer_types(draw, settings) if some(draw) else {})


def olmoe(draw: Draw) -> dict[str, Any]:
    settings = common(draw, None) | routed(draw, "num_experts", "intermediate_size") | rope(draw) | attention_bias(draw)
    return settings | {"norm_topk_prob": some(draw), "clip_qkv": 2.0 if some(draw, RARE) else None}


def llama(draw: Draw) -> dict[str, Any]:
    return common(draw) | rope(draw) | attention_bias(draw) | {"mlp_bias": some(draw, RARE)}


def mistral(draw: Draw) -> dict[str, Any]:
    return common(draw) | rope(draw) | {"sliding_window": draw.choice((None, draw.randint(1, 9)))}


def qwen2(draw: Draw) -> dict[str, Any]:
    settings = common(draw, None) | rope(draw)
    return settings | qwen_windows(draw, settings)


def qwen3(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | {"head_dim": draw.choice((4, 8, 12))} | rope(draw) | attention_bias(draw)
    return settings | qwen_windows(draw, settings)


def glm4_moe(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | grouped(draw) | rope(draw, fraction=True) | attention_bias(draw)
    return settings | {"head_dim": draw.choice((8, 16)), "use_qk_norm": some(draw)}


def dots1(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | grouped(draw) | rope(draw) | attention_bias(draw)
    windows = draw.choice(({}, {"sliding_window": None}, {"sliding_window": 4, "max_window_layers": draw.randint(0, 4)}))
    return settings | (layer_types(draw, settings) if some(draw, 0.3) else windows)


def ernie4_5_moe(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | routed(draw, "moe_num_experts", top_k="moe_k") | rope(draw)
    return settings | {
        "moe_layer_start_index": draw.randint(0, 3),
        "moe_layer_end_index": draw.choice((-1, draw.randint(0, 3))),
        "moe_layer_interval": draw.randint(1, 3),
        "moe_num_shared_experts": draw.randint(0, 2),
        "use_bias": some(draw, RARE),
    }


def minimax_m2(draw: Draw) -> dict[str, Any]:
    settings = common(draw) | routed(draw, "num_local_experts", "intermediate_size") | rope(draw, fraction=True)
    return settings | {"head_dim": draw.choice((8, 16))}


def hybrid(draw: Draw) -> dict[str, Any]:
    """What Qwen3-Next and Qwen3.5-MoE share: gated DeltaNet in some layers."""
    settings = common(draw) | routed(draw, "num_experts") | rope(draw, fraction=True) | attention_bias(draw)
    keys, layers = draw.randint(1, 3), settings["num_hidden_layers"]
    types = [f"{draw.choice(('linear', 'full'))}_attention" for _ in range(layers)]
    return settings | {
        "head_dim": draw.choice((8, 16)),
        "shared_expert_intermediate_size": draw.choice((7, 16, 32)),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * draw.randint(1, 3),
        "linear_key_head_dim": draw.randint(1, 9),
        "linear_value_head_dim": draw.randint(1, 9),
        "linear_conv_kernel_dim": draw.randint(1, 5),
        **draw.choice(({}, {"layer_types": types}, {"full_attention_interval": draw.randint(1, 3)})),
    }


def qwen3_next(draw: Draw) -> dict[str, Any]:
    settings = hybrid(draw) | {"norm_topk_prob": some(draw), "decoder_sparse_step": draw.choice((1, 1, 2))}
    return settings | {"mlp_only_layers": [layer for layer in range(settings["num_hidden_layers"]) if some(draw, 0.25)]}


def longcat_flash(draw: Draw) -> dict[str, Any]:
    settings = latent(draw) | routed(draw, "n_routed_experts", "expert_ffn_hidden_size", "moe_topk") | rope(draw)
    return settings | {
        "num_hidden_layers": 2 * draw.randint(1, 2),
        "q_lora_rank": draw.randint(4, 14),
        "head_dim": settings["qk_rope_head_dim"],
        "zero_expert_num": draw.choice((0, 1, 4)),
        "routed_scaling_factor": draw.choice((1.0, 6.0)),
    }


DRAWS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "Mixtral": mixtral,
    "Qwen2Moe": qwen2_moe,
    "Qwen3Moe": qwen3_moe,
    "DeepseekV2": deepseek_v2,
    "DeepseekV3": deepseek_v3,
    "GptOss": gpt_oss,
    "Olmoe": olmoe,
    "Glm4Moe": glm4_moe,
    "Dots1": dots1,
    "Ernie4_5_Moe": ernie4_5_moe,
    "MiniMaxM2": minimax_m2,
    "Llama": llama,
    "Mistral": mistral,
    "Qwen2": qwen2,
    "Qwen3": qwen3,
    "Qwen3Next": qwen3_next,
    "Qwen3_5Moe": hybrid,
    "LongcatFlash": longcat_flash,
}


def longrope(draw: Draw, settings: dict[str, Any]) -> dict[str, Any]:
    """The factors of longrope, one for each rotated pair of a head; rarely one too few."""
    rope = settings.get("rope_parameters", {})
    if rope.get("rope_type") != "longrope":
        return settings
    width = (
        settings.get("qk_rope_head_dim") or settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    )
    pairs = max(1, int(width * rope.get("partial_rotary_factor", 1.0)) // 2 - some(draw, RARE))
    factors = {name: [round(draw.uniform(1, 8), 2) for _ in range(pairs)] for name in ("short_factor", "long_factor")}
    return settings | {"rope_parameters": rope | factors}


def drawn(family: str, draw: Draw) -> dict[str, Any]:
    """Random settings of the family; of one that is not in DRAWS, those of one of its CASES, in part at random."""
    if family in DRAWS:
        return longrope(draw, DRAWS[family](draw))
    cases = [settings for name, settings in CASES.values() if name == family]
    free = {key: common(draw)[key] for key in ("vocab_size", "rms_norm_eps", "tie_word_embeddings")}
    return draw.choice(cases) | free
