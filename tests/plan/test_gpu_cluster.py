"""The catalogue of GPUs, and clusters of them."""

import importlib

import pytest
from tokenyard.plan.gpu_cluster import Cluster, read_cluster
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.gpus import gpu_of_device, gpus
from tokenyard.train.logging.peak_flops import data_sheet


def test_a_cluster_is_a_type_and_a_number() -> None:
    cluster = read_cluster("h100x2048")
    assert (str(cluster), cluster.hosts, cluster.gpu.flops["bf16"], cluster.gpu.memory_bytes) == ("h100x2048", 256, 989.5e12, 80e9)
    assert read_cluster("mi300xx16").ranks == 16 and read_cluster("mi300x").ranks == 8 and read_cluster("gb200").ranks == 4


@pytest.mark.parametrize(
    ("text", "nearest"), [("h10x4", "h100x4"), ("h100x0", "h100x8"), ("h100x8x", "h100x8"), ("", "a100x8"), ("b200 x8", "b200x8")]
)
def test_a_wrong_cluster_is_one_line(text: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^cluster={text}: must be .*; nearest valid: cluster={nearest}$"):
        read_cluster(text)


@pytest.mark.parametrize(
    ("ranks", "step", "reached"), [(1, 1, 1), (8, 1, 8), (64, 1, 8), (12, 1, 6), (4, 2, 4), (8, 2, 4), (2, 8, 1), (2, 99, 1)]
)
def test_ranks_reached_without_the_network(ranks: int, step: int, reached: int) -> None:
    assert Cluster(gpus()["h100"], 1024).reached(ranks, step) == reached


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200_nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Something Else", None),
    ],
)
def test_the_type_of_a_device(device: str, name: str | None) -> None:
    gpu = gpu_of_device(device)
    assert (gpu and gpu.name) == name


def test_the_peak_of_a_run_is_that_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_sheet("NVIDIA GB300", "bf16") == gpus()["gb300"].flops["bf16"] and data_sheet("NVIDIA GB300", "fp64") is None
    # `make gpu` runs where PyYAML may be missing: the peak is measured then.
    monkeypatch.setattr("tokenyard.train.config.gpus.gpus", lambda: importlib.import_module("no_such_library"))
    assert data_sheet("NVIDIA GB300", "bf16") is None


def test_the_catalogue_is_plausible() -> None:
    """Units are right: a factor of 1000, or bits for bytes, would break an order that all GPUs have."""
    for gpu in gpus().values():
        assert 40e12 < gpu.flops["bf16"] < 5000e12 and gpu.flops.get("fp8", 2 * gpu.flops["bf16"]) == pytest.approx(
            2 * gpu.flops["bf16"], rel=0.02
        )
        assert 5e9 < gpu.memory_bytes < 300e9 and 250e9 < gpu.memory_bytes_per_second < 10e12
        assert gpu.network_bytes_per_second <= gpu.nvlink_bytes_per_second < gpu.memory_bytes_per_second
        assert gpu.price is None or 0.2 < gpu.price.low <= gpu.price.likely <= gpu.price.high < 20
        assert gpu.source and {"low", "price", "network"}.isdisjoint(gpu.flops)
