"""DeepSeek-V2 and DeepSeek-V3: multi-head latent attention, shared experts, group-limited routing."""

from typing import Any

from ...moe.config import AttentionKind, GroupScore, ModelConfig, Scope, Score
from ..config_reader import ConfigReader
from ..rope import read_rope, write_rope
from ..weight_mapping import DENSE, EXPERT_BIAS, NORMS, ROUTER, experts, feedforward, layer_tensors
from .family import COMMON, Family, norm_topk_prob, read_common, read_experts, read_norm_topk_prob, write_common

EPSILON = 1e-6
"""transformers uses this epsilon in the norms of the latents, whatever rms_norm_eps is."""


def read_v2(reader: ConfigReader) -> ModelConfig:
    config = read_latent(reader, interleaved=True)
    read_dense_first(reader, config)
    reader.require("mlp_bias", None, False)
    reader.require("topk_method", "greedy", "group_limited_greedy")
    reader.require("scoring_func", None, "softmax")
    reader.require("norm_topk_prob", None, False, why="transformers would not do it")
    config.moe.router.normalize_top_k = False
    if reader.any("topk_method") == "group_limited_greedy":
        _read_groups(reader, config, GroupScore.max)
    else:
        for unused in ("n_group", "topk_group"):
            reader.any(unused)
    config.moe.balance.coefficient = reader.number("aux_loss_alpha")
    config.moe.balance.scope = Scope.sequence if reader.flag("seq_aux") else Scope.batch
    return config


def read_v3(reader: ConfigReader) -> ModelConfig:
    config = read_latent(reader, interleaved=reader.flag("rope_interleave"))
    read_dense_first(reader, config)
    read_sigmoid_routing(reader, config)
    config.moe.balance.sequence_by_scores = True
    read_prediction(reader, config)
    return config


def write_v2(config: ModelConfig) -> dict[str, Any]:
    router, balance = config.moe.router, config.moe.balance
    return write_latent(config) | {
        "first_k_dense_replace": config.dense_first,
        "topk_method": "greedy" if router.groups == 1 else "group_limited_greedy",
        "n_group": None if router.groups == 1 else router.groups,
        "topk_group": None if router.groups == 1 else router.top_groups,
        "scoring_func": "softmax",
        "aux_loss_alpha": balance.coefficient,
        "seq_aux": balance.scope is Scope.sequence,
    }


def write_v3(config: ModelConfig) -> dict[str, Any]:
    return (
        write_latent(config)
        | write_sigmoid_routing(config)
        | {
            "first_k_dense_replace": config.dense_first,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_interleave": config.attention.rope.interleaved,
            "num_nextn_predict_layers": config.mtp_depth,
        }
    )


# Keys about experts that families with DeepSeek's layers share.


def read_routed(reader: ConfigReader, config: ModelConfig) -> None:
    """Routed and shared experts."""
    read_experts(reader, config, "n_routed_experts", "moe_intermediate_size")
    config.moe.shared_hidden = reader.integer("n_shared_experts", 0) * config.moe.hidden
    config.moe.router.scale = reader.positive("routed_scaling_factor")


def read_dense_first(reader: ConfigReader, config: ModelConfig) -> None:
    """`first_k_dense_replace`, the number of dense layers before those with experts."""
    config.dense_first = min(reader.integer("first_k_dense_replace", 0), config.layers)


def write_routed(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_routed` reads."""
    return {
        "n_routed_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.hidden,
        "n_shared_experts": config.moe.shared_hidden // config.moe.hidden,
        "routed_scaling_factor": config.moe.router.scale,
    }


def read_sigmoid_routing(reader: ConfigReader, config: ModelConfig, *names: str) -> None:
    """Routing by sigmoid scores and an expert bias, from the best groups. The losses are those of DeepSeek-V3 (section 4.2).

    `names`: what else `scoring_func` may say.
    """
    reader.require("topk_method", None, "noaux_tc")
    reader.require("scoring_func", None, "sigmoid", *names)
    config.moe.router.score = Score.sigmoid
    read_norm_topk_prob(reader, config)
    _read_groups(reader, config, GroupScore.top2)
    balance = config.moe.balance
    balance.coefficient, balance.sequence_coefficient, balance.bias_rate = 0.0, 0.0001, 0.001


def write_sigmoid_routing(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_sigmoid_routing` reads, but those that only published files have."""
    router = config.moe.router
    return {"n_group": router.groups, "topk_group": router.top_groups, "norm_topk_prob": norm_topk_prob(config)}


def read_prediction(reader: ConfigReader, config: ModelConfig) -> None:
    """`num_nextn_predict_layers`. transformers (MtpModel) feeds each module what the norm before the head returns."""
    config.mtp_depth = reader.integer("num_nextn_predict_layers", 0)
    config.mtp_after_norm = config.mtp_depth > 0


def read_latent(reader: ConfigReader, interleaved: bool) -> ModelConfig:
    """A model with multi-head latent attention and routed experts, which no layer is without."""
    config = read_common(reader)
    reader.require("moe_layer_freq", None, 1)
    read_routed(reader, config)
    read_mla(reader, config, interleaved)
    return config


def read_mla(reader: ConfigReader, config: ModelConfig, interleaved: bool, theta: float = 10000.0) -> None:
    """Multi-head latent attention, and its rotary embedding, whose theta is `theta` if no key says it."""
    reader.require("num_key_value_heads", None, config.heads)
    reader.require("attention_bias", None, False)
    attention, mla = config.attention, config.attention.mla
    attention.kind = AttentionKind.mla
    mla.q_rank, mla.kv_rank = reader.optional_integer("q_lora_rank"), reader.integer("kv_lora_rank")
    mla.nope_width, mla.rope_width = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    mla.value_width = reader.integer("v_head_dim")
    mla.norm_epsilon = None if config.norm_epsilon == EPSILON else EPSILON
    reader.require("head_dim", None, mla.rope_width)
    reader.require("qk_head_dim", None, mla.nope_width + mla.rope_width)
    attention.rope = read_rope(reader, theta, mscale=True, interleaved=interleaved)


def _read_groups(reader: ConfigReader, config: ModelConfig, score: GroupScore) -> None:
    router = config.moe.router
    router.groups, router.top_groups, router.group_score = reader.integer("n_group"), reader.integer("topk_group"), score
    if config.moe.experts % router.groups:
        raise reader.wrong("n_group", f"must divide n_routed_experts={config.moe.experts}")
    if score is GroupScore.top2 and config.moe.experts < 2 * router.groups:
        raise reader.wrong("n_group", f"must leave two of n_routed_experts={config.moe.experts} in each group, which rank it")
    if router.top_groups > router.groups:
        raise reader.wrong("topk_group", f"must be at most n_group={router.groups}")
    if config.moe.experts // router.groups * router.top_groups < config.moe.top_k:
        raise reader.wrong("num_experts_per_tok", f"must be at most the experts of topk_group={router.top_groups} groups")


def write_latent(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_latent` reads."""
    return write_common(config) | write_routed(config) | write_mla(config)


def write_mla(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_mla` reads."""
    mla = config.attention.mla
    return {
        "num_key_value_heads": config.heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_width,
        "qk_rope_head_dim": mla.rope_width,
        "v_head_dim": mla.value_width,
        "head_dim": mla.rope_width,
        "qk_head_dim": mla.nope_width + mla.rope_width,
        "rope_parameters": write_rope(config.attention.rope),
    }


LATENT: dict[str, Any] = COMMON | {
    "attention_bias": False,
    "head_dim": None,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "num_key_value_heads": None,
    "output_router_logits": False,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_head_dim": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "v_head_dim": 128,
}
MLA = {
    "q.weight": "q_proj.weight",
    "q_down.weight": "q_a_proj.weight",
    "q_norm.weight": "q_a_layernorm.weight",
    "q_up.weight": "q_b_proj.weight",
    "kv_down.weight": "kv_a_proj_with_mqa.weight",
    "kv_norm.weight": "kv_a_layernorm.weight",
    "kv_up.weight": "kv_b_proj.weight",
    "o.weight": "o_proj.weight",
}
"""Tensors of latent attention, ours to Hugging Face's."""
LATENT_TENSORS = (
    NORMS
    | DENSE
    | ROUTER
    | experts()
    | feedforward("moe.shared", "mlp.shared_experts")
    | layer_tensors({f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in MLA.items()})
)

DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    defaults=LATENT
    | {
        "aux_loss_alpha": 0.001,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "moe_intermediate_size": 1407,
        "n_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 32,
        "num_experts_per_tok": None,
        "num_hidden_layers": 32,
        "routed_scaling_factor": 1.0,
        "seq_aux": True,
        "topk_group": None,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    read=read_v2,
    write=write_v2,
    tensors=LATENT_TENSORS,
    irrelevant=frozenset(("ep_size",)),
)

DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    defaults=LATENT
    | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "vocab_size": 129280,
    },
    read=read_v3,
    write=write_v3,
    tensors=LATENT_TENSORS | EXPERT_BIAS,
    irrelevant=frozenset(("ep_size", "aux_loss_alpha", "seq_aux")),  # the loss-free bias takes its place
    preset="deepseek_v3",
)
