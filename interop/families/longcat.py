"""LongCat-Flash (Meituan 2025): latent attention, experts on a shortcut, and experts that return the token.

A layer there is two blocks here: each has attention and a dense feed-forward, and the second has the experts of the layer, which
take the input of the first's feed-forward (`model.moe.shortcut`).
"""

from typing import Any

from ...moe.config import ModelConfig
from ..config_reader import ConfigReader
from ..weight_mapping import Source, StoredForms, feedforward, gate, layer_tensors, up
from .deepseek import MLA, read_mla, write_mla
from .family import COMMON, Family, read_common, read_experts, write_common


def read(reader: ConfigReader) -> ModelConfig:
    config = read_common(reader, layers="num_layers", hidden="ffn_hidden_size")
    config.layers *= 2
    config.moe_every = 2
    if reader.given("num_hidden_layers"):
        reader.require("num_hidden_layers", config.layers)
    read_experts(reader, config, "n_routed_experts", "expert_ffn_hidden_size", "moe_topk")
    router = config.moe.router
    config.moe.shortcut = True
    router.null_experts = router.copy_experts = reader.integer("zero_expert_num", 0) if reader.any("zero_expert_num") else 0
    reader.require("zero_expert_type", None, "identity")
    reader.require("router_bias", None, False, why="transformers would not add it")
    router.normalize_top_k = False
    router.scale = reader.positive("routed_scaling_factor")
    config.moe.balance.coefficient, config.moe.balance.bias_rate = 0.0, 0.001
    read_mla(reader, config, interleaved=True, theta=1e7)
    if config.attention.mla.q_rank is None:
        raise reader.wrong("q_lora_rank", "must be a whole number of at least 1")
    config.attention.mla.scale_latents = True
    for key in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        reader.require(key, None, True, why="transformers always does it")
    reader.require("attention_method", None, "MLA")
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    written = write_common(config) | {
        "num_layers": config.layers // 2,
        "ffn_hidden_size": config.hidden,
        "expert_ffn_hidden_size": config.moe.hidden,
        "moe_topk": config.moe.top_k,
        "n_routed_experts": config.moe.experts,
        "routed_scaling_factor": config.moe.router.scale,
        "zero_expert_num": config.moe.router.copy_experts,
        **write_mla(config),
    }
    return {key: value for key, value in written.items() if key not in ("num_hidden_layers", "intermediate_size")}


def idle(config: ModelConfig) -> dict[str, str]:
    """transformers has gates and up projections of zero experts too."""
    names = (
        f"model.layers.{layer}.mlp.experts.%d.{kind}_proj.weight" for layer in range(config.layers // 2) for kind in ("gate", "up")
    )
    experts = range(config.moe.experts, config.moe.experts + config.moe.router.null_experts)
    return {name % expert: name % 0 for name in names for expert in experts}


PAIR = "model.layers.{pair}."
EXPERT = PAIR + "mlp.experts.{expert}"
TENSORS: dict[str, StoredForms] = {
    "moe.experts.gate_up": ((Source(f"{EXPERT}.gate_proj.weight", gate), Source(f"{EXPERT}.up_proj.weight", up)),),
    "moe.experts.down": ((Source(f"{EXPERT}.down_proj.weight"),),),
}
HALVES = {
    "attention_norm.weight": "input_layernorm.{half}.weight",
    "feedforward_norm.weight": "post_attention_layernorm.{half}.weight",
    "moe.router.weight": "mlp.router.classifier.weight",
    "moe.router.expert_bias": "mlp.router.e_score_correction_bias",
    **{f"attention.{ours}": "self_attn.{half}." + theirs for ours, theirs in MLA.items()},
}

LONGCAT_FLASH = Family(
    architecture="LongcatFlashForCausalLM",
    model_type="longcat_flash",
    defaults=COMMON
    | {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "expert_ffn_hidden_size": 2048,
        "ffn_hidden_size": 12288,
        "head_dim": 64,
        "hidden_size": 6144,
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "moe_topk": 12,
        "n_routed_experts": 512,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "num_layers": 28,
        "output_router_logits": False,
        "q_lora_rank": 1536,
        "qk_head_dim": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 6.0,
        "v_head_dim": 128,
        "vocab_size": 131072,
        "zero_expert_num": 256,
    },
    read=read,
    write=write,
    tensors=TENSORS | layer_tensors(HALVES, PAIR) | feedforward("dense", "mlps.{half}", PAIR),
    left_out=r"model\.mtp\..*",
    idle=idle,
    preset="longcat_flash",
)
