"""`tokenyard params`: the table, the JSON object, layouts, and what is refused. test_params_folder.py has Hugging Face's."""

import re
import subprocess
import sys
import time

import pytest
from params_answers import asked, refused
from tokenyard.launch.main import main
from tokenyard.train.config.number_format import gigabytes


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


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_states_are_counted_in_bytes(capsys: pytest.CaptureFixture[str], states: str) -> None:
    """Two moments of 4, 2 or 1 bytes, with a scale of 4 bytes for 256 numbers; those of routers and norms have 4."""
    words = "model=mixtral_8x7b", "parallel.expert=8", "parallel.shard=8", f"optimizer.states={states}"
    found = asked(capsys, *words)
    wide = found["per_rank"]["norms"] + found["per_rank"]["router"]
    narrow = found["per_rank"]["total"] - wide
    moments = round(2 * (4 * wide + {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}[states] * narrow))
    held = found["bytes_per_rank"]
    assert (held["optimizer"], held["host"]) == (moments, 0)
    assert held["total"] == 8 * found["per_rank"]["total"] + moments
    lean = asked(capsys, *words, "optimizer.gradients=bf16")["bytes_per_rank"]
    assert (lean["gradients"], lean["total"]) == (4 * wide + 2 * narrow, held["total"] - 2 * narrow)
    offloaded = asked(capsys, *words, "optimizer.offload=true")["bytes_per_rank"]
    assert (offloaded["optimizer"], offloaded["host"], offloaded["total"]) == (0, moments, 8 * found["per_rank"]["total"])


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
    """Although the tokenizer does not fit this vocabulary, and the batch does not divide."""
    assert asked(capsys, "model=tiny_mixtral", "parallel.shard=32")["world"] == 32


def test_an_answer_takes_less_than_two_seconds() -> None:
    start = time.monotonic()
    code = "import time; from tokenyard.launch.main import main; main(['params', 'model=deepseek_v3']); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    # Of processor time: the machine may be busy with other things.
    assert float(done.stdout.split()[-1]) < 2
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 bytes"), (1_340_000_000_000, "1.34 TB"), (46_702_792_704, "46.7 GB"), (999.7e9, "1,000 GB")]
)
def test_bytes_are_short(number: float, text: str) -> None:
    assert gigabytes(number) == text
