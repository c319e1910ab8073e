"""`tokenyard params`: the table, the JSON object, layouts, Hugging Face folders, and what is refused."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenyard.launch.main import main
from tokenyard.launch.params import gigabytes


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["params", *words, "--json"]) == 0
    out, error = capsys.readouterr()
    assert (out.count("\n"), error) == (1, "")
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["params", *words]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error


def test_json_is_one_object_with_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "model=mixtral_8x7b", "sequence_length=4096")
    assert found["total"] == 46_702_792_704
    assert found["active"] == sum(value for part, value in found["parts"].items() if part != "experts")
    assert found["per_rank"]["total"] == found["total"]
    assert found["flops_per_token"] == 2 * (found["active"] - 32000 * 4096 - 65 * 4096) + 32 * 2 * 32 * 128 * 4097
    assert found["training_flops_per_token"] == 3 * found["flops_per_token"]
    assert found["kv_cache_bytes_per_token"] == 32 * 2 * 8 * 128 * 2
    assert found["inference_bytes"] == {"bf16": 93_405_585_408, "fp8": 46_702_792_704, "int4": 23_351_396_352}
    assert found["devices_of_80_gb"] == {"bf16": 2, "fp8": 1, "int4": 1}  # 93.4 of 2 x 72 GB


def test_a_layout_is_counted_on_the_ranks_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    whole = asked(capsys, "model=mixtral_8x7b")
    spread = asked(capsys, "model=mixtral_8x7b", "parallel.expert=8", "parallel.tensor=2")
    assert spread["world"] == 8
    assert spread["per_rank"]["experts"] == whole["parts"]["experts"] // 8
    assert spread["per_rank"]["attention"] == whole["parts"]["attention"] // 2
    assert spread["per_rank"]["norms"] == whole["parts"]["norms"]
    assert spread["bytes_per_rank"]["weights"] == 4 * spread["per_rank"]["total"]
    assert spread["bytes_per_rank"]["total"] == 16 * spread["per_rank"]["total"]
    assert {key: spread[key] for key in ("total", "active")} == {key: whole[key] for key in ("total", "active")}


def test_more_ranks_than_needed_shard_experts_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "model=mixtral_8x7b", "parallel.expert=8", "parallel.shard=8", "launch=torchrun", "launch.ranks=16")
    assert found["world"] == 16
    assert found["per_rank"]["experts"] == found["parts"]["experts"] // 16


def test_expert_tensor_ranks_share_each_expert(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "model=gpt_oss_20b", "parallel.expert=4", "parallel.expert_tensor=2")
    assert found["world"] == 8
    # Only the biases of `down` are whole: 24 layers, 32 experts, 2880 wide.
    biases = 24 * 32 * 2880
    assert found["per_rank"]["experts"] == (found["parts"]["experts"] - biases) // 8 + biases // 4


def test_the_world_of_a_launcher_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert asked(capsys, "model=mixtral_8x7b", "parallel.expert=8")["world"] == 32


def test_fp64_is_held_in_fp64(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "precision=fp64")
    assert found["bytes_per_rank"]["weights"] == 8 * found["total"]


def test_multi_token_prediction_is_held_but_not_in_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "model=deepseek_v3")
    assert found["per_rank"]["total"] == found["total"] + found["parts"]["mtp"]
    assert found["training_flops_per_token"] > 3 * found["flops_per_token"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "model=deepseek_v3", "parallel.expert=64", "parallel.shard=8", "sequence_length=4096"]) == 0
    out = capsys.readouterr().out
    for words in (
        "deepseek_v3: 61 layers, experts in 58; 7168 wide, 128 heads (mla)",
        "top-8 of 256 from 4 of 8 groups, sigmoid scores, normalized, x 2.5, shared expert of 2048, balance by expert bias",
        "671B total, 37.6B active per token (5.6%)",
        "64 ranks: replicate 8 x shard 8 x tensor 1; expert 64",
        "bf16 1.34 TB, fp8 671 GB, int4 336 GB",
        "19 x 80 GB (bf16)",
        "68.6 KiB per token",
    ):
        assert words in out
    columns = [line.split() for line in out.splitlines() if re.match(r"  \w+ +[\d,]+ ", line)]
    numbers = {name: [int(cell.replace(",", "")) for cell in cells] for name, *cells in columns}
    total = numbers.pop("all")
    predicted = numbers.pop("prediction")
    assert [sum(column) for column in zip(*numbers.values(), strict=True)] == [total[0], total[1], total[2] - predicted[2]]


def test_dense(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "model=dense")
    assert (found["kind"], found["routing"], found["moe_layers"]) == ("dense", "dense", 0)
    assert found["total"] == found["active"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=mixtral"], "nearest valid: model="),
        (["model=mixtral_8x7b", "parallel.expert=3"], "parallel.expert=3: must divide model.moe.experts=8"),
        (["model=mixtral_8x7b", "parallel.tensor=3"], "parallel.tensor=3: must divide model.heads=32"),
        (["model.moe.top_k=9"], "model.moe.top_k=9: must be at most"),
        (["model.lairs=3"], "nearest valid: model.layers=3"),
        (["nowhere"], "nowhere: has no config.json"),
        (["nowhere", "elsewhere"], "one folder at a time"),
        (["nowhere", "model=tiny"], "model=tiny: nowhere says what the model is"),
    ],
)
def test_refusals_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *words)


def test_what_a_count_does_not_need_is_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither does the tokenizer fit this vocabulary, nor does the batch divide."""
    assert asked(capsys, "model=tiny_mixtral", "parallel.shard=32")["world"] == 32


def test_an_answer_takes_less_than_two_seconds() -> None:
    start = time.monotonic()
    code = "import time; from tokenyard.launch.main import main; main(['params', 'model=deepseek_v3']); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    # Of processor time: the machine may be busy with other things.
    assert float(done.stdout.split()[-1]) < 2
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 bytes"), (1_340_000_000_000, "1.34 TB"), (46_702_792_704, "46.7 GB"), (999.7e9, "1,000 GB")]
)
def test_bytes_are_short(number: float, text: str) -> None:
    assert gigabytes(number) == text


PUBLISHED = {
    # config.json as published, but for keys that say nothing about the weights' sizes; and the same model among the presets.
    "mixtral_8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen3_30b_a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt_oss_20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
    },
    "olmoe_1b_7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "attention_dropout": 0.0,
        "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 50304,
    },
    "qwen2_57b_a14b": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_act": "silu",
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "moe_intermediate_size": 2560, "norm_topk_prob": False, "num_attention_heads": 28, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 20480,
        "sliding_window": 65536, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_counted_as_its_preset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    found, preset = asked(capsys, str(tmp_path)), asked(capsys, f"model={name}", "sequence_length=4096")
    predicted = {"per_rank", "bytes_per_rank", "training_flops_per_token"}  # what has no weights here is not read
    different = {key for key in preset if found[key] != preset[key]}
    assert different - {"model", "parts", *(predicted if preset["parts"]["mtp"] else ())} == set()
    assert {**found["parts"], "mtp": 0} == {**preset["parts"], "mtp": 0}


def test_a_folder_with_a_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["mixtral_8x7b"]))
    found = asked(capsys, str(tmp_path), "parallel.expert=4", "sequence_length=128")
    assert (found["world"], found["sequence_length"]) == (4, 128)
    assert found["per_rank"]["experts"] * 4 == found["parts"]["experts"]


def test_a_dense_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3 8B: 8.03B parameters, by its card."""
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    found = asked(capsys, str(tmp_path))
    assert (found["kind"], found["total"]) == ("dense", 8_030_261_248)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "config.json: "),
        ("[]", "must hold a JSON object"),
        ('{"architectures": ["BertModel"]}', "architectures=['BertModel']: must be one of"),
        (json.dumps(PUBLISHED["mixtral_8x7b"] | {"hidden_act": "gelu_new"}), "hidden_act='gelu_new'"),
        (json.dumps(PUBLISHED["mixtral_8x7b"] | {"flux_capacitor": 1}), "flux_capacitor=1: is not supported"),
    ],
)
def test_folders_that_cannot_be_read(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert says in refused(capsys, str(tmp_path))
    assert refused(capsys, str(tmp_path)).startswith(f"tokenyard: {tmp_path / 'config.json'}: ")


def test_auditing_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt_oss_20b"]))
    code = f"import sys; from tokenyard.launch.main import main; main(['params', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "20.9B total" in done.stdout
    assert done.stdout.endswith("False\n")
