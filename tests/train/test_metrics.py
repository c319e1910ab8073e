"""Every number of a record worked by hand from crafted counts, and the peak that MFU divides by."""

import math
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
import torch
from step_numbers import step_numbers
from tokenyard.moe import linear
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from tokenyard.train.logging.metrics import Meter, load_metrics, null_expert_metrics
from tokenyard.train.logging.peak_flops import data_sheet, measure, peak_flops
from tokenyard.train.step import StepNumbers

MODEL = ModelConfig(
    layers=4, width=8, heads=2, kv_heads=1, vocabulary=16, hidden=1024, dense_first=1, moe=MoEConfig(experts=4, top_k=2, hidden=4)
)


COUNTS = [[10, 10, 10, 10], [25, 5, 10, 0], [16, 8, 8, 8]]


def numbers(**changes: object) -> StepNumbers:
    return step_numbers(
        torch.tensor(COUNTS),
        tokens=20,
        cross_entropy=torch.tensor(2.5).double(),
        balance_L=torch.tensor([1.0, 1.25, 1.5]).double(),
        z_L=torch.tensor([0.25, 0.75, 0.5]).double(),
        dropped_L=torch.tensor([0, 5, 1]),
        gradient_norm=torch.tensor(0.75).double(),
    )._replace(**changes)


def record_of(meter: Meter, step: int = 1, seconds: float = 0.5) -> dict[str, Any]:
    return meter.record(step, numbers(), 1e-3, 20, seconds)


def test_the_whole_record():
    # forward: 2 x weights (attention 4x2x8x4x3=768, router 3x4x8=96, experts 3x2x96=576, dense 3x8x1024=24576, head 128)
    # + attention 4 layers x 2 x 2 heads x 4 wide x (9 + 1)
    forward = 2 * (768 + 96 + 576 + 24576 + 128) + 4 * 2 * 2 * 4 * 10
    assert record_of(Meter(MODEL, sequence_length=9, peak_flops=1e9, tokens=100)) == {
        "step": 1,
        "tokens": 120,
        "loss": 2.5,
        "loss_balance": 1.25,
        "loss_z": 0.5,
        "loss_balance_scaled": 0.01 * 1.25 * 3,
        "loss_z_scaled": 0.001 * 0.5 * 3,
        "grad_norm": 0.75,
        "lr": 1e-3,
        "tokens_per_second": 40.0,
        "step_seconds": 0.5,
        "mfu": 40.0 * 3 * forward / 1e9,
        "dropped_fraction": 6 / 120,
        "moe/load_max_over_mean": 2.5,
        "moe/load_max_over_mean_layer": 2,  # block 0 is dense
        "moe/load_max_over_mean_mean": (1.0 + 2.5 + 1.6) / 3,
        "moe/load_min_over_mean": 0.0,
        "moe/dead_experts": 1,
    }


def test_a_pooled_balance_loss_is_one_of_all_layers():
    pooled = replace(MODEL, moe=replace(MODEL.moe, balance=BalanceConfig(0.01, pool_layers=True)))
    record = record_of(Meter(pooled, 9, 1e9))
    assert (record["loss_balance"], record["loss_z"]) == (3.75, 0.5)
    assert (record["loss_balance_scaled"], record["loss_z_scaled"]) == pytest.approx((0.0375, 0.0015))


def test_tokens_add_up_over_steps():
    meter = Meter(MODEL, 9, 1e9, tokens=7)
    records = [record_of(meter, step, 1.0) for step in (1, 2, 3)]
    assert [record["tokens"] for record in records] == [27, 47, 67]
    assert meter.tokens == 67


def test_tensors_and_lists_give_the_same_record():
    from_tensors = load_metrics(torch.tensor(COUNTS), torch.tensor([0, 5, 1]), [1, 2, 3])
    assert from_tensors == load_metrics(COUNTS, [0, 5, 1], [1, 2, 3])
    assert all(type(value) in (int, float) for value in record_of(Meter(MODEL, 9, 1e9)).values())


def test_same_keys_for_any_number_of_experts():
    few = load_metrics([[1] * 8], [0], [0])
    many = load_metrics([[1] * 512] * 60, [0] * 60, list(range(60)))
    assert few == many
    assert few["moe/load_max_over_mean"] == 1.0


def test_null_share():
    counts_LE = torch.tensor([[10, 20, 6], [8, 16, 4]])
    null = MoEConfig(experts=2, router=RouterConfig(null_experts=1))
    assert null_expert_metrics(ModelConfig(layers=2, moe=null), counts_LE) == {"moe/null_fraction": 10 / 64}
    assert null_expert_metrics(ModelConfig(layers=2, moe=MoEConfig(experts=3)), counts_LE) == {}
    dense = ModelConfig(moe=MoEConfig(experts=0, router=RouterConfig(null_experts=1)))
    assert null_expert_metrics(dense, torch.zeros(0, 0, dtype=torch.int64)) == {}


def test_counts_beyond_float_precision_stay_exact():
    big = 2**53 + 1
    assert load_metrics([[big, big]], [big], [3])["dropped_fraction"] == 0.5


def test_dense_model_has_no_expert_keys():
    assert load_metrics([], [], []) == {"dropped_fraction": 0.0}
    assert load_metrics(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), []) == {"dropped_fraction": 0.0}


def test_the_first_of_equally_bad_layers_is_named():
    assert load_metrics([[1, 1], [2, 0], [0, 2]], [0, 0, 0], [4, 6, 8])["moe/load_max_over_mean_layer"] == 6


def test_a_step_without_tokens_does_not_divide_by_zero():
    record = load_metrics([[0, 0]], [0], [0])
    assert record["dropped_fraction"] == 0.0
    assert record["moe/dead_experts"] == 2
    assert not any(math.isnan(value) for value in record.values())


@pytest.mark.parametrize(
    ("name", "mode", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp32", 60.0),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA L40S", "fp64", None),
        ("Something Else", "bf16", None),
    ],
)
def test_data_sheets(name: str, mode: str, teraflops: float | None):
    assert data_sheet(name, mode) == (teraflops and teraflops * 1e12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cpu_peak_is_measured_in_a_third_of_a_second(dtype: torch.dtype):
    start = perf_counter()
    flops = measure(torch.device("cpu"), dtype)
    assert perf_counter() - start < 2.0  # 0.3 s on an idle machine
    assert 1e8 < flops < 1e14


def test_ranks_beyond_the_cores_add_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tokenyard.train.logging.peak_flops.measure", lambda device, dtype: 100.0)
    monkeypatch.setattr("tokenyard.train.logging.peak_flops._cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu = torch.device("cpu")
    assert [peak_flops(cpu, torch.float32, ranks).flops for ranks in (1, 2, 4)] == [100.0, 200.0, 200.0]
    assert peak_flops(cpu, torch.float32, ranks=8, ranks_per_host=2).flops == 800.0


@pytest.mark.parametrize(("multiplies", "made_in"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_peak_of_bf16_is_that_of_the_products_that_are_made(multiplies: bool, made_in: torch.dtype, monkeypatch):
    """Emulated ones would be a fifth of it, and MFU five times too high."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr(linear, "MULTIPLIES_BF16", multiplies)
    monkeypatch.setattr("tokenyard.train.logging.peak_flops.measure", lambda device, dtype: asked.append(dtype) or 100.0)
    assert peak_flops(torch.device("cpu"), torch.bfloat16).flops == 100.0 and asked == [made_in]
