"""Settings of tiny transformers models: each family, and what it can vary."""

from typing import Any

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.5, 4.0, 8.0],
}
MLA = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral one kv head, wide heads": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 1, "head_dim": 16}),
    "mixtral window, tied, 3 of 5": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 32}),
    "qwen2_moe normalised, dense layers": (
        "Qwen2Moe",
        {**QWEN, "shared_expert_intermediate_size": 8, "norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 4},
    ),
    "qwen2_moe windows": (
        "Qwen2Moe",
        {
            **QWEN,
            "shared_expert_intermediate_size": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 16}),
    "qwen3_moe normalised, biases, window, tied": (
        "Qwen3Moe",
        {
            **QWEN,
            "head_dim": 8,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe yarn": ("Qwen3Moe", {**QWEN, "head_dim": 16, "mlp_only_layers": [0], "rope_parameters": YARN}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "n_shared_experts": 2, "first_k_dense_replace": 1}),
    "deepseek_v2 lite": ("DeepseekV2", {**MLA, "q_lora_rank": None, "n_shared_experts": 1, "routed_scaling_factor": 2.0}),
    "deepseek_v2 groups, yarn": (
        "DeepseekV2",
        {
            **MLA,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": ("DeepseekV3", {**MLA, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}),
    "deepseek_v3 one group, half rotation, yarn": (
        "DeepseekV3",
        {
            **MLA,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 4}),
    "gpt_oss full attention, no biases": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 2,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe normalised, all heads": (
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True, "num_key_value_heads": 4, "attention_bias": True},
    ),
    "llama": ("Llama", {}),
    "llama3 rope, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama linear rope, biases": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, "attention_bias": True, "head_dim": 12},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 window, tied": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "tie_word_embeddings": True},
    ),
}
ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
SOLAR = {key: value for key, value in ROUTED.items() if key != "first_k_dense_replace"}
ERNIE = {"moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 1}
CASES |= {
    "glm4_moe": ("Glm4Moe", {**ROUTED, "head_dim": 16, "routed_scaling_factor": 2.5}),
    "glm4_moe normed heads, groups, biases, yarn, tied": (
        "Glm4Moe",
        {
            **ROUTED,
            "n_shared_experts": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.75},
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe whole heads rotated": ("Glm4Moe", {**ROUTED, "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 1.0}}),
    "dots1": ("Dots1", {**ROUTED, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": None}),
    "dots1 windows, groups, biases": (
        "Dots1",
        {
            **ROUTED,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "max_window_layers": 1,
            "n_group": 2,
            "topk_group": 1,
            "attention_bias": True,
            "n_shared_experts": 2,
        },
    ),
    "ernie4_5_moe": ("Ernie4_5_Moe", ERNIE),
    "ernie4_5_moe layers between dense ones, no shared expert": (
        "Ernie4_5_Moe",
        {
            **ERNIE,
            "num_hidden_layers": 6,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 4,
            "moe_layer_interval": 2,
            "moe_num_shared_experts": 0,
            "tie_word_embeddings": False,
        },
    ),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}),
    "minimax_m2 half rotated, tied": (
        "MiniMaxM2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window, wide heads, tied": ("Mistral", {"sliding_window": 5, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows": (
        "Qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "deepseek_v3 other epsilon than its latents, no shared expert": (
        "DeepseekV3",
        {**MLA, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "rms_norm_eps": 0.25, "n_shared_experts": 0},
    ),
    "deepseek_v2 other epsilon than its latents": ("DeepseekV2", {**MLA, "n_shared_experts": 1, "rms_norm_eps": 0.25}),
    "mixtral one expert": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen3_moe one expert, irregular dense layers": (
        "Qwen3Moe",
        {
            **QWEN,
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
            "num_hidden_layers": 6,
            "mlp_only_layers": [0, 2, 3],
        },
    ),
    "qwen2_moe no shared expert": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 0}),
    "gpt_oss irregular windows": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 3,
            "num_hidden_layers": 4,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full", "full")],
        },
    ),
    "llama yarn with mscale": (
        "Llama",
        {
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 0, "truncate": None}
            | {"original_max_position_embeddings": 64}
        },
    ),
    "llama dynamic rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}, "max_position_embeddings": 16}
        | {"head_dim": 4},
    ),
    "mixtral longrope, the short factors": (
        "Mixtral",
        {"num_local_experts": 4, "head_dim": 8, "rope_parameters": LONGROPE, "max_position_embeddings": 256},
    ),
    "qwen3_moe longrope, the long factors": (
        "Qwen3Moe",
        {**QWEN, "head_dim": 8, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 18, "factor": 3.0}},
    ),
    "deepseek_v3 longrope, one normalised expert": (
        "DeepseekV3",
        {
            **MLA,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 8, "attention_factor": 1.25},
        },
    ),
    "llama longrope, lengths outside, a document longer than the original": (
        "Llama",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "head_dim": 8},
    ),
    "olmoe clipped": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5}),
    "ernie4_5_moe one expert": ("Ernie4_5_Moe", {**ERNIE, "moe_k": 1}),
    "minimax_m2 one expert": ("MiniMaxM2", {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 16}),
    "mixtral odd widths": ("Mixtral", {"num_local_experts": 4, "hidden_size": 36, "intermediate_size": 21, "head_dim": 8}),
}
CASES |= {
    "glm4_moe_lite": ("Glm4MoeLite", {**MLA, "n_shared_experts": 1}),
    "glm4_moe_lite groups, irregular dense layers, yarn": (
        "Glm4MoeLite",
        {
            **MLA,
            "num_hidden_layers": 5,
            "mlp_layer_types": ["sparse", "dense", "sparse", "dense", "dense"],
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "rope_interleave": False,
            "rms_norm_eps": 0.25,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek_v3 as Kimi K2": (
        "DeepseekV3",
        {
            **MLA,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.827,
            "rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "solar_open": ("SolarOpen", {**SOLAR, "head_dim": 16}),
    "solar_open groups, biases, yarn, tied": (
        "SolarOpen",
        {
            **SOLAR,
            "head_dim": 8,
            "attention_bias": True,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe other factors, biases": (
        "GraniteMoe",
        {"attention_bias": True, "logits_scaling": 49.0, "residual_multiplier": 1.7, "attention_multiplier": 0.4},
    ),
    "granitemoe one expert": ("GraniteMoe", {"num_experts_per_tok": 1, "attention_multiplier": 0.3, "head_dim": 12}),
    "flex_olmo": ("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 3}),
    "flex_olmo normalised, all heads, biases, wide": (
        "FlexOlmo",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "head_dim": 12,
            "tie_word_embeddings": True,
        },
    ),
}
DELTA = {
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
CASES |= {
    "qwen3_next": ("Qwen3Next", DELTA),
    "qwen3_next irregular layers, biases, one dense, other factors, tied": (
        "Qwen3Next",
        {
            **DELTA,
            "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
            "attention_bias": True,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "linear_conv_kernel_dim": 2,
            "linear_num_value_heads": 6,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_next linear layers alone": (
        "Qwen3Next",
        {**DELTA, "num_hidden_layers": 2, "linear_num_key_heads": 4, "use_cache": False},
    ),
    "qwen3_5_moe": ("Qwen3_5Moe", DELTA),
    "qwen3_5_moe biases, positions of images": (
        "Qwen3_5Moe",
        {
            **DELTA,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
}
LONGCAT = {
    "num_hidden_layers": 4,  # num_layers of 2
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "zero_expert_num": 3,
    "moe_topk": 3,
    "expert_ffn_hidden_size": 16,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
CASES |= {
    "longcat_flash": ("LongcatFlash", LONGCAT),
    "longcat_flash no zero experts, yarn, tied": (
        "LongcatFlash",
        {
            **LONGCAT,
            "num_hidden_layers": 2,
            "zero_expert_num": 0,
            "routed_scaling_factor": 1.5,
            "rms_norm_eps": 0.25,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
            "tie_word_embeddings": True,
        },
    ),
}
IMPORTED = (  # an export writes these models with other keys, or without tensors that have no elements
    "deepseek_v3 other epsilon than its latents, no shared expert",
    "qwen2_moe no shared expert",
    "ernie4_5_moe layers between dense ones, no shared expert",
    "llama yarn with mscale",
    "mixtral odd widths",
    "qwen3_5_moe biases, positions of images",
    "llama longrope, lengths outside, a document longer than the original",
    "longcat_flash",  # the gates of its zero experts, which nothing uses
)
