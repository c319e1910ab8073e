"""config.json: every key is understood, known not to matter, or refused by name; what is written means the same when read."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tokenyard.interop.config_mapping import choose_family, differences, read_config, write_config
from tokenyard.interop.families import FAMILIES, Family
from tokenyard.interop.families.harmless import IRRELEVANT, WITHOUT_EFFECT, harmless
from tokenyard.moe.config import (
    Activation,
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RouterConfig,
    Selection,
)
from tokenyard.train.config.compose import compose

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
NAMED = {
    "Qwen3MoeForCausalLM": {"num_experts", "head_dim"},
    "DeepseekV2ForCausalLM": {"moe_layer_freq", "aux_loss_alpha", "seq_aux"},
}
NAMED |= {
    "DeepseekV3ForCausalLM": {"moe_layer_freq"},
    "Glm4MoeLiteForCausalLM": {"moe_layer_freq", "head_dim", "num_nextn_predict_layers"},
    "SolarOpenForCausalLM": {"intermediate_size"},
    "Qwen3_5MoeForCausalLM": {"intermediate_size"},
}
"""Keys of published files that transformers 5 does not write."""
NEEDED = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Dots1ForCausalLM": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2},
}
"""Keys without defaults, or with defaults that make no model."""


def given(family: Family, **settings: Any) -> dict[str, Any]:
    """config.json as transformers writes it for its defaults."""
    transformers = pytest.importorskip("transformers")
    name = family.architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    needed = NEEDED.get(family.architecture, {})
    written = json.loads(config(architectures=[family.architecture], **needed).to_json_string())
    return written | settings


@families
def test_defaults_are_those_of_transformers(family: Family) -> None:
    theirs = given(family)
    _, from_all = read_config(theirs)
    _, from_none = read_config({"architectures": [family.architecture], **NEEDED.get(family.architecture, {})})
    assert differences(from_none, from_all) == {}


@families
def test_every_key_of_theirs_is_known_and_written(family: Family) -> None:
    theirs = given(family)
    written = write_config(*read_config(theirs))
    assert theirs.keys() - written.keys() <= {"transformers_version", "num_local_experts"}
    assert {key for key in written.keys() - theirs.keys() if written[key] is not None} - NAMED.get(family.architecture, set()) <= {
        "topk_method",
        "scoring_func",
    }


@families
def test_an_unknown_key_is_refused(family: Family) -> None:
    with pytest.raises(ValueError, match=r"^config.json: quantum_heads=3: is not supported$"):
        read_config(given(family, quantum_heads=3))


@families
def test_what_is_written_means_the_same(family: Family) -> None:
    _, model = read_config(given(family))
    assert differences(read_config(write_config(family, model))[1], model) == {}
    assert choose_family(model, family.architecture) is family


@families
def test_a_wrong_type_is_refused(family: Family) -> None:
    for key, value in {"hidden_size": "64", "vocab_size": 1.5, "rms_norm_eps": None, "tie_word_embeddings": 1}.items():
        with pytest.raises(ValueError, match=rf"^config.json: {key}="):
            read_config(given(family, **{key: value}))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
KIMI_K2 = {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "rope_parameters": {
        "type": "yarn",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "vocab_size": 163840,
}
REFUSED = [
    ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
    ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias=True"),
    ("LlamaForCausalLM", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "rope_parameters.rope_type='axial'"),
    ("LlamaForCausalLM", {"head_dim": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type="),
    ("LlamaForCausalLM", {"rope_parameters": {**DYNAMIC, "original_max_position_embeddings": 5}}, "rope_parameters.original_max"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor=None: must be a list of numbers"),
    ("LlamaForCausalLM", {"rope_scaling": {**LONGROPE, "long_factor": [-1.0] * 64}}, "rope_scaling.long_factor="),
    (
        "LlamaForCausalLM",
        {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}},
        "rope_scaling.long_factor=[1.0]: must be a list of",
    ),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor=None"),
    ("LlamaForCausalLM", {"rope_parameters": {**YARN, "short_factor": [1]}}, "rope_parameters.short_factor=[1]"),
    ("LlamaForCausalLM", {"rope_parameters": {**YARN, "mscale": -1.0}}, "rope_parameters.mscale=-1.0"),
    ("LlamaForCausalLM", {"rope_parameters": {**YARN, "beta_fast": -1.0}}, "rope_parameters.beta_fast=-1.0: must be above 0"),
    ("LlamaForCausalLM", {"rope_parameters": {**YARN, "beta_slow": 64}}, "rope_parameters.beta_fast=None: must be at least beta"),
    ("LlamaForCausalLM", {"rope_parameters": {**YARN, "attention_factor": 0}}, "rope_parameters.attention_factor=0: must be"),
    ("LlamaForCausalLM", {"rope_theta": 0, "rope_parameters": None}, "rope_parameters.rope_theta=0: must be above 1"),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": -5.0}}, "rope_parameters.rope_theta=-5.0: must be above 1"),
    (
        "Glm4MoeForCausalLM",
        {"rope_parameters": {"partial_rotary_factor": 0.29}},
        "rope_parameters.partial_rotary_factor=0.29: must",
    ),
    ("Glm4MoeForCausalLM", {"n_group": 128, "topk_group": 99}, "n_group=128: must leave two of n_routed_experts=128"),
    ("Ernie4_5_MoeForCausalLM", {"use_bias": True}, "use_bias=True"),
    ("Ernie4_5_MoeForCausalLM", {"moe_norm_min": 0.5}, "moe_norm_min=0.5: must be above 0 and at most 1e-12"),
    ("MiniMaxM2ForCausalLM", {"attn_type_list": [1, 0]}, "attn_type_list=[1, 0]"),
    ("MiniMaxM2ForCausalLM", {"use_routing_bias": False}, "use_routing_bias=False"),
    ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense"]}, "mlp_layer_types=['dense']: must be 47 times dense or sparse"),
    ("Glm4MoeLiteForCausalLM", {"first_k_dense_replace": 3}, "first_k_dense_replace=3: must be None or 1"),
    ("SolarOpenForCausalLM", {"first_k_dense_replace": 1}, "first_k_dense_replace=1: must be None or 0"),
    ("GraniteMoeForCausalLM", {"residual_multiplier": 0}, "residual_multiplier=0: must be above 0"),
    ("GraniteMoeForCausalLM", {"logits_scaling": -1}, "logits_scaling=-1: must be above 0"),
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("LlamaForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method='fp8'"),
    ("MixtralForCausalLM", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok=9: must be at most num_local_experts=8"),
    ("Qwen2MoeForCausalLM", {"mlp_only_layers": "3"}, "mlp_only_layers='3'"),
    ("Qwen2MoeForCausalLM", {"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention']"),
    ("Qwen3NextForCausalLM", {"layer_types": ["sliding_attention"] * 48}, "layer_types=['sliding_attention', "),
    ("Qwen3NextForCausalLM", {"layer_types": None, "full_attention_interval": 0}, "full_attention_interval=0: must be a whole"),
    ("Qwen3NextForCausalLM", {"linear_num_value_heads": 24}, "linear_num_value_heads=24: must be a multiple of linear_num_key_"),
    ("Qwen3NextForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.005}}, "rope_parameters.partial_rotary_factor=0.005"),
    ("Qwen3_5MoeForCausalLM", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0: must be a whole number"),
    ("Qwen3_5MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob=False: must be True"),
    ("OlmoeForCausalLM", {"clip_qkv": 0}, "clip_qkv=0: must be above 0"),
    ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
    ("GptOssForCausalLM", {"experts_per_token": 3}, "experts_per_token=3"),
    ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("DeepseekV3ForCausalLM", {"n_group": 7}, "n_group=7: must divide n_routed_experts=256"),
    ("DeepseekV3ForCausalLM", {"n_group": 64, "topk_group": 1}, "num_experts_per_tok=8: must be at most the experts of"),
    ("DeepseekV3ForCausalLM", {"num_key_value_heads": 8}, "num_key_value_heads=8"),
    ("DeepseekV3ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    (
        "DeepseekV3ForCausalLM",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}},
        "rope_parameters.mscale_all_dim=0.0",
    ),
]


@pytest.mark.parametrize(("architecture", "change", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_cannot_be_expressed_is_refused_by_name(architecture: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_config(given(FAMILIES[architecture], **change))
    assert f"config.json: {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_context_length_outside_of_the_rope_keys_wins() -> None:
    """As in transformers for Phi-3: LlamaConfig(original_max_position_embeddings=16, ...) builds its angles with 16."""
    rope = LONGROPE | {"original_max_position_embeddings": 32}
    _, model = read_config(given(FAMILIES["LlamaForCausalLM"], rope_parameters=rope, original_max_position_embeddings=16))
    assert model.attention.rope.original_length == 16
    assert model.attention.rope.factor == 2048 / 16


@pytest.mark.parametrize(("interval", "linear"), [(1, []), (3, [0, 1, 3, 4, 6, 7]), (9, list(range(8)))])
def test_an_interval_of_full_attention_without_layer_types(interval: int, linear: list[int]) -> None:
    theirs = given(FAMILIES["Qwen3NextForCausalLM"], num_hidden_layers=8, layer_types=None, full_attention_interval=interval)
    _, model = read_config(theirs)
    assert [index for index in range(8) if model.linear_layer(index)] == linear


def test_kimi_k2_is_deepseek_v3() -> None:
    """Its published file names DeepSeek's architecture, and a model type of its own."""
    family, model = read_config(given(FAMILIES["DeepseekV3ForCausalLM"], model_type="kimi_k2", **KIMI_K2))
    assert family.architecture == "DeepseekV3ForCausalLM"
    preset = compose(["model=kimi_k2"]).model
    preset.init_std = model.init_std
    assert differences(preset, model) == {}


@pytest.mark.parametrize("config", [{}, {"architectures": ["GPT2LMHeadModel"]}, {"model_type": "mamba"}, {"architectures": "x"}])
def test_another_architecture_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of LlamaForCausalLM, Qwen3ForCausalLM"):
        read_config(config)


@families
def test_irrelevant_keys_change_nothing(family: Family) -> None:
    _, model = read_config(given(family))
    kept = {"architectures", "model_type", "max_position_embeddings"}  # the last is the default of another key
    _, same = read_config(given(family, **dict.fromkeys((IRRELEVANT | family.irrelevant) - kept, "anything")))
    assert same == model


NOT_HERE = [
    ("MixtralForCausalLM", {"use_qk_norm": True}),
    ("LlamaForCausalLM", {"qkv_bias": True}),
    ("Qwen2MoeForCausalLM", {"qkv_bias": False, "use_qkv_bias": True}),
    ("Qwen3MoeForCausalLM", {"shared_expert_intermediate_size": 64}),
    ("OlmoeForCausalLM", {"use_qk_norm": False}),
    ("LlamaForCausalLM", {"rope_interleaved": True}),
    ("DeepseekV2ForCausalLM", {"rope_interleaved": False}),
    ("MixtralForCausalLM", {"layer_types": ["sliding_attention"] * 32}),
    ("MixtralForCausalLM", {"n_shared_experts": 1}),
    ("MixtralForCausalLM", {"norm_topk_prob": False}),
    ("MixtralForCausalLM", {"routed_scaling_factor": 2.0}),
    ("MixtralForCausalLM", {"scoring_func": "sigmoid"}),
    *[("LlamaForCausalLM", {key: 0.5}) for key in sorted(WITHOUT_EFFECT)],
]


@pytest.mark.parametrize(("architecture", "change"), NOT_HERE, ids=str)
def test_a_key_that_says_something_else_than_the_model_is_refused(architecture: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: {list(change)[-1]}=.*: must be "):
        read_config(given(FAMILIES[architecture], **change))


@families
@pytest.mark.parametrize("key", sorted(harmless(ModelConfig())))
def test_a_key_that_says_what_the_model_is_anyway_changes_nothing(family: Family, key: str) -> None:
    theirs = given(family)
    _, model = read_config(theirs)
    for value in harmless(model)[key]:
        if key not in theirs:  # those that the family reads have their own tests
            assert read_config(theirs | {key: value})[1] == model


def mixtral(**settings: Any) -> ModelConfig:
    return replace(ModelConfig(layers=2), **settings)


CHOSEN = [
    (mixtral(), "MixtralForCausalLM"),
    (mixtral(moe=MoEConfig(top_k=1)), "Qwen3MoeForCausalLM"),
    (mixtral(moe=MoEConfig(experts=0)), "LlamaForCausalLM"),
    (mixtral(dense_first=2), "LlamaForCausalLM"),
    (mixtral(moe=MoEConfig(experts=0), attention=AttentionConfig(qk_norm=QKNorm.head)), "Qwen3ForCausalLM"),
    (mixtral(attention=AttentionConfig(qk_norm=QKNorm.head), moe_every=2), "Qwen3MoeForCausalLM"),
    (mixtral(attention=AttentionConfig(qk_norm=QKNorm.full)), "OlmoeForCausalLM"),
    (mixtral(moe=MoEConfig(shared_hidden=64, shared_gate=True)), "Qwen2MoeForCausalLM"),
    (mixtral(attention=AttentionConfig(window=4)), "MixtralForCausalLM"),
    (
        mixtral(
            dropout=0.1,
            moe=MoEConfig(dropout=0.4, capacity=CapacityConfig(factor=1.0), balance=BalanceConfig(0.5), z_coefficient=1.0),
        ),
        "MixtralForCausalLM",
    ),
]


@pytest.mark.parametrize(("model", "architecture"), CHOSEN, ids=[name for _, name in CHOSEN])
def test_a_model_gets_the_first_architecture_that_can_express_it(model: ModelConfig, architecture: str) -> None:
    if model.moe.top_k == 1:
        model.attention.qk_norm = QKNorm.head
    assert choose_family(model).architecture == architecture


INEXPRESSIBLE = [
    (mixtral(moe=MoEConfig(router=RouterConfig(null_experts=2))), "model.moe.router.null_experts=2"),
    (mixtral(moe=MoEConfig(router=RouterConfig(selection=Selection.expert_choice))), "model.moe.router.selection=expert_choice"),
    (mixtral(moe=MoEConfig(router=RouterConfig(noise=True))), "model.moe.router.noise=True"),
    (mixtral(moe=MoEConfig(activation=Activation.relu)), "model.moe.activation=relu"),
    (mixtral(moe=MoEConfig(capacity=CapacityConfig(evaluation_factor=1.0))), "model.moe.capacity.evaluation_factor=1.0"),
    (mixtral(moe=MoEConfig(balance=BalanceConfig(bias_rate=0.01))), "model.moe.balance.bias_rate=True"),
    (mixtral(sandwich_norms=True), "model.sandwich_norms=True"),
    (mixtral(output_softcap=30.0), "model.output_softcap=30.0"),
    (mixtral(attention=AttentionConfig(softcap=30.0)), "model.attention.softcap=30.0"),
    (mixtral(attention=AttentionConfig(window=4, window_every=3), layers=3, sandwich_norms=True), "model.sandwich_norms=True"),
]


@pytest.mark.parametrize(("model", "says"), INEXPRESSIBLE, ids=[says for _, says in INEXPRESSIBLE])
def test_what_no_architecture_can_express_is_named(model: ModelConfig, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_family(model)
    assert says in str(caught.value) and "no architecture can express it" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        write_config(FAMILIES["MixtralForCausalLM"], model)
    assert str(caught.value) == f"{says}: MixtralForCausalLM cannot express it"


def test_experts_in_a_dense_architecture() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot express it"):
        write_config(FAMILIES["LlamaForCausalLM"], mixtral())
    with pytest.raises(ValueError, match="MixtralForCausalLM cannot express the model: num_local_experts=0"):
        write_config(FAMILIES["MixtralForCausalLM"], mixtral(moe=MoEConfig(experts=0)))
