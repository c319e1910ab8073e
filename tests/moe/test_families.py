"""Whole models of eight families give the logits of transformers' from the same weights, in fp64; with a cache too.

Each family brings parts that others lack. Routers are left to what all of them share (softmax, with or without normalisation): the
others are compared in the tests of routers.
"""

from typing import Any, NamedTuple

import pytest
import torch
from their_weights import their_value
from tokenyard.moe.attention import KeyValueCache
from tokenyard.moe.config import (
    Activation,
    AttentionConfig,
    AttentionKind,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RopeConfig,
    RopeScaling,
    RouterConfig,
)
from tokenyard.moe.model import Transformer

pytest.importorskip("transformers", reason="comparing needs transformers (pip install 'tokenyard[hf]')")
import transformers
from transformers import modeling_rope_utils as rope_utils
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

VOCABULARY, WIDTH, LENGTH = 50, 32, 11
THEIR_SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 2}
THEIR_SIZES |= {"max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}


class Family(NamedTuple):
    module: Any
    config: str
    model: str
    theirs: dict[str, Any]
    ours: ModelConfig


def our(moe: MoEConfig | None = None, rope: RopeConfig | None = None, attention: dict | None = None, **model: Any) -> ModelConfig:
    settings = AttentionConfig(rope=rope or RopeConfig(theta=500.0), **(attention or {}))
    sizes = {"layers": 2, "width": WIDTH, "heads": 4, "kv_heads": 2, "vocabulary": VOCABULARY, "norm_epsilon": 1e-5}
    return ModelConfig(**(sizes | {"attention": settings, "moe": moe or MoEConfig(experts=0)} | model))


def yarn(**changes: Any) -> RopeConfig:
    return RopeConfig(theta=500.0, scaling=RopeScaling.yarn, factor=4.0, original_length=16, beta_fast=4.0, **changes)


def deepseek(q_rank: int | None) -> Family:
    mla = {"kv_lora_rank": 12, "q_lora_rank": q_rank, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10, "head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 24}
    routing = {"topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    sizes = {"intermediate_size": 40, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    rope = {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}
    return Family(
        deepseek_v2,
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        mla | experts | routing | sizes | rope,
        our(
            MoEConfig(4, 2, 24, shared_hidden=48, router=RouterConfig(normalize_top_k=False)),
            yarn(interleaved=True, mscale=1.0, mscale_all=0.7),
            {"kind": AttentionKind.mla, "mla": MLAConfig(q_rank, 12, 6, 8, 10)},
            dense_first=1,
            hidden=40,
            norm_epsilon=1e-6,
        ),
    )


FAMILIES = {
    "llama, llama3 rope, biases, tied": Family(
        llama,
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "tie_word_embeddings": True,
        }
        | {
            "rope_parameters": PLAIN_ROPE
            | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 16}
        },
        our(
            rope=RopeConfig(theta=500.0, scaling=RopeScaling.llama3, factor=4.0, original_length=16),
            attention={"qkv_bias": True, "output_bias": True},
            hidden=40,
            tie_embeddings=True,
        ),
    ),
    "gemma 2": Family(
        gemma2,
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"num_key_value_heads": 2, "intermediate_size": 40, "rms_norm_eps": 1e-5, "head_dim": 12, "query_pre_attn_scalar": 20}
        | {"sliding_window": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "rope_parameters": PLAIN_ROPE},
        our(
            attention={"window": 4, "window_every": 2, "softcap": 3.0, "scale": 20**-0.5},
            head_width=12,
            hidden=40,
            activation=Activation.geglu,
            sandwich_norms=True,
            embedding_multiplier=torch.tensor(WIDTH**0.5).item(),  # theirs is kept in fp32
            output_softcap=5.0,
        ),
    ),
    "qwen2-moe": Family(
        qwen2_moe,
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "rms_norm_eps": 1e-5}
        | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False, "decoder_sparse_step": 2, "intermediate_size": 40}
        | {"rope_parameters": PLAIN_ROPE},
        our(
            MoEConfig(4, 2, 24, shared_hidden=40, shared_gate=True, router=RouterConfig(normalize_top_k=False)),
            attention={"qkv_bias": True},
            moe_every=2,
            hidden=40,
        ),
    ),
    "qwen3-moe, window": Family(
        qwen3_moe,
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "rms_norm_eps": 1e-5}
        | {"head_dim": 12, "norm_topk_prob": True, "rope_parameters": PLAIN_ROPE, "use_sliding_window": True, "sliding_window": 5},
        our(MoEConfig(4, 2, 24), attention={"qk_norm": QKNorm.head, "window": 5}, head_width=12),
    ),
    "olmoe": Family(
        olmoe,
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "rms_norm_eps": 1e-5}
        | {"norm_topk_prob": False, "rope_parameters": PLAIN_ROPE},
        our(MoEConfig(4, 2, 24, router=RouterConfig(normalize_top_k=False)), attention={"qk_norm": QKNorm.full}),
    ),
    "gpt-oss": Family(
        gpt_oss,
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 12}
        | {"sliding_window": 4, "rms_norm_eps": 1e-5, "rope_parameters": YARN | {"truncate": False}},
        our(
            MoEConfig(4, 2, 24, activation=Activation.swiglu_clamped, bias=True),
            yarn(truncate=False),
            {"sinks": True, "window": 4, "window_every": 2, "qkv_bias": True, "output_bias": True},
            head_width=12,
        ),
    ),
    "deepseek-v2-lite": deepseek(None),
    "deepseek-v2": deepseek(16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_logits(name: str, widen) -> None:
    family = FAMILIES[name]
    widen(family.module, rope_utils)
    theirs, ours = pair(family)
    ids_BS = torch.randint(VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        expected_BSV, logits_BSV = theirs(input_ids=ids_BS, use_cache=False).logits, ours(ids_BS)
    torch.testing.assert_close(logits_BSV, expected_BSV, rtol=0, atol=1e-10 * expected_BSV.abs().max().item())
    cache = [KeyValueCache() for _ in ours.layers]
    with torch.no_grad():
        in_steps = torch.cat([ours(part, cache=cache) for part in ids_BS.split([4, 1, 1, 3, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(in_steps, logits_BSV, rtol=0, atol=1e-10 * expected_BSV.abs().max().item())


def pair(family: Family) -> tuple[Any, Transformer]:
    """Returns their model and ours, with the same random weights (norms, biases and sinks too)."""
    torch.manual_seed(0)
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = getattr(transformers, family.config)(**(THEIR_SIZES | family.theirs | implementations))
    theirs = getattr(family.module, family.model)(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.5)
    if family.module is gpt_oss:
        for layer in theirs.model.layers:
            torch.nn.init.zeros_(layer.mlp.router.bias)
    ours = Transformer(family.ours, torch.float64, seed=None).eval()
    used: set[str] = set()
    for name, parameter in ours.named_parameters():
        value = their_value(theirs, name, used)
        assert value.shape == parameter.shape, name
        parameter.data.copy_(value)
    left = {name for name, _ in theirs.named_parameters() if name not in used and "router.bias" not in name}
    assert not left, "every parameter of theirs has a place in ours"
    return theirs, ours
