"""Each family against transformers: equal logits after an import, equal tensors and logits after an export."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from safetensors.torch import load_file, save_file
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from torch import Tensor, nn

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
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
    "mixtral odd widths": ("Mixtral", {"num_local_experts": 4, "hidden_size": 36, "intermediate_size": 21, "head_dim": 8}),
}
IMPORTED = (  # an export writes these models with other keys, or without tensors that have no elements
    "deepseek_v3 other epsilon than its latents, no shared expert",
    "qwen2_moe no shared expert",
    "ernie4_5_moe layers between dense ones, no shared expert",
    "llama yarn with mscale",
    "mixtral odd widths",
)
BOTH_WAYS = {name: case for name, case in CASES.items() if name not in IMPORTED}
cases = pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=list(CASES))
both_ways = pytest.mark.parametrize(("family", "settings"), BOTH_WAYS.values(), ids=list(BOTH_WAYS))
IDS = torch.arange(2 * 19).view(2, 19) * 7 % 48


@cases
def test_same_logits(family: str, settings: dict[str, Any], saved: Callable[..., Path], build: Callable[..., Any]) -> None:
    expected = build(family, **settings)(IDS).logits
    found = tokenyard.load_model(saved(family, **settings))(IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@cases
def test_same_logits_in_fp64(
    family: str,
    settings: dict[str, Any],
    saved: Callable[..., Path],
    build: Callable[..., Any],
    widest: Callable[[str], None],
) -> None:
    folder = saved(family, **settings)
    widest(family)
    expected = build(family, **settings).double()(IDS).logits
    torch.testing.assert_close(tokenyard.load_model(folder, "fp64")(IDS), expected, rtol=0, atol=1e-8)


@both_ways
def test_round_trip_is_bit_equal(family: str, settings: dict[str, Any], saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved(family, **settings)
    checkpoint = import_folder(theirs, tmp_path / "ours").checkpoint
    export_checkpoint(tmp_path / "ours", tmp_path / "again", shard_bytes=20_000)
    assert_same_tensors(tensors(tmp_path / "again"), tensors(theirs))
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert_same_model(tokenyard.load_model(checkpoint), tokenyard.load_model(theirs))
    written, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", theirs))
    if family == "Qwen3Moe":  # published files have the other name, transformers takes both
        given["num_experts"] = given.pop("num_local_experts")
    if family in ("DeepseekV3", "Glm4Moe"):  # the modules that the key speaks of are not in the files
        assert given.pop("num_nextn_predict_layers") == 1
    del given["transformers_version"]
    given["rope_parameters"] = written["rope_parameters"] | given["rope_parameters"]  # defaults may be said
    if family == "Dots1" or settings.get("use_sliding_window"):  # layer_types goes before it
        given["max_window_layers"] = written.get("max_window_layers")
    assert {key: written.get(key) for key in given} == given


@both_ways
def test_transformers_opens_the_export(
    family: str, settings: dict[str, Any], saved: Callable[..., Path], build: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    import_folder(saved(family, **settings), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert {key: value for key, value in loading.items() if value} == {}
    assert_same_model(again, build(family, **settings))


FUSED = [name for name in CASES if name.split()[0] in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe")]


@pytest.mark.parametrize("name", [name for name in FUSED if " " not in name])
def test_experts_as_they_are_in_memory_are_read_too(name: str, build: Callable[..., Any], tmp_path: Path) -> None:
    family, settings = CASES[name]
    model = build(family, **settings)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in tensors(tmp_path / "fused"))
    torch.testing.assert_close(tokenyard.load_model(tmp_path / "fused")(IDS), model(IDS).logits, rtol=0, atol=1e-4)


def test_bf16_stays_bf16(build: Callable[..., Any], tmp_path: Path) -> None:
    build("Mixtral", num_local_experts=4).bfloat16().save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    for dtype, code in ((None, torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        export_checkpoint(tmp_path / "ours", tmp_path / f"{dtype}", dtype=dtype)
        found = tensors(tmp_path / f"{dtype}")
        assert_same_tensors(found, {name: tensor.to(code) for name, tensor in tensors(tmp_path / "theirs").items()})
        said = json.loads((tmp_path / f"{dtype}" / "config.json").read_text())["dtype"]
        assert said == str(code).removeprefix("torch.")


def test_older_names_of_the_rope_keys_mean_the_same(saved: Callable[..., Path]) -> None:
    folder = saved("Llama", rope_parameters=LLAMA3)
    expected = tokenyard.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    old = copy.deepcopy(config.pop("rope_parameters"))
    config |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": {"type": old.pop("rope_type"), **old}}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_model(tokenyard.load_model(folder), expected)


def test_a_tied_head_that_is_written_too_must_be_equal(saved: Callable[..., Path]) -> None:
    folder = saved("Qwen3", head_dim=8, tie_word_embeddings=True)
    expected, found = tokenyard.load_model(folder), tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, folder / "model.safetensors")
    assert_same_model(tokenyard.load_model(folder), expected)
    found["lm_head.weight"][3, 4] += 1
    save_file(found, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight must equal model\.embed_tokens\.weight"):
        tokenyard.load_model(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    """Weights are equal bit for bit. Logits may differ by rounding: a BLAS chooses kernels by the alignment of the weights."""
    assert_same_tensors(found.state_dict(), expected.state_dict())
    one, other = (model(IDS) for model in (found, expected))
    one, other = (output if isinstance(output, Tensor) else output.logits for output in (one, other))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name
