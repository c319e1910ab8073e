"""The peak FLOP/s of the devices, by which MFU is defined: from data sheets, otherwise measured by a short matrix product."""

import math
import os
from time import perf_counter
from typing import NamedTuple

import torch

from ...moe.linear import compute_dtype


class Peak(NamedTuple):
    """FLOP/s of all devices of the run together, and the source of the number in words."""

    flops: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype, ranks: int = 1, ranks_per_host: int | None = None) -> Peak:
    """Returns the peak of `ranks` devices like this rank's `device` for products in `dtype`; fp32 is TF32 where torch may use that.

    A CPU is measured with the threads of this process, in the type that moe/linear.py uses; ranks beyond the host's cores add
    nothing.
    """
    if device.type == "cpu":
        per_host = ranks_per_host or ranks
        at_once = min(per_host, max(1.0, _cores() / torch.get_num_threads()))
        made_in = compute_dtype(torch.empty(0, dtype=dtype))
        return Peak(measure(device, made_in) * ranks * at_once / per_host, "measured by a matrix product")
    name, mode = torch.cuda.get_device_name(device), MODES[dtype]
    if mode == "fp32" and torch.get_float32_matmul_precision() != "highest":
        mode = "tf32"
    if known := data_sheet(name, mode):
        return Peak(known * ranks, "from its data sheet")
    return Peak(measure(device, dtype) * ranks, f"measured by a matrix product, {name} is not in the table")


def data_sheet(name: str, mode: str) -> float | None:
    """Returns the dense peak in FLOP/s of the CUDA device `name` in `mode` (bf16, tf32, fp32, fp64); None if it is not listed."""
    row = next((row for key, row in _TERAFLOPS if all(word in name for word in key.split())), None)
    return row[mode] * 1e12 if row and mode in row else None


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Returns the best FLOP/s of square products of growing size that fit into `seconds`."""
    best, end = 0.0, perf_counter() + seconds
    for size in (128, 256, 512, 1024, 2048, 4096, 8192):
        x = torch.ones(size, size, dtype=dtype, device=device)
        took = min(_product_seconds(x), _product_seconds(x))  # the first also builds kernels
        best = max(best, 2 * size**3 / took)
        if perf_counter() + 2 * 8 * took > end:  # two products of twice the size would not fit
            break
    while perf_counter() + took < end:
        took = _product_seconds(x)
        best = max(best, 2 * size**3 / took)
    return best


def _product_seconds(x: torch.Tensor) -> float:
    """Returns the time of x @ x, waiting for the device before and after."""
    _wait(x.device)
    start = perf_counter()
    torch.mm(x, x)
    _wait(x.device)
    return max(perf_counter() - start, math.ulp(1.0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MODES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16", torch.float64: "fp64"}

# Dense teraFLOP/s (data sheets print bf16 and tf32 with sparsity: twice as much); fp64 on tensor cores where there are any.
# Sources: NVIDIA data sheets "A100 80GB" (2021), "H100" and "H100 NVL" (2024), "H200" (2024), "GB200 NVL72" and "HGX B200" (2024),
# "L40S" (2023), and the "Ada GPU Architecture" white paper for RTX 4090 (fp32 accumulation). Special forms before general ones.
_TERAFLOPS = (
    ("GB200", {"bf16": 2500.0, "tf32": 1250.0, "fp32": 80.0, "fp64": 40.0}),
    ("B200", {"bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0, "fp64": 37.0}),
    ("H200 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0, "fp64": 60.0}),
    ("H200", {"bf16": 989.5, "tf32": 494.5, "fp32": 67.0, "fp64": 67.0}),
    ("H100 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0, "fp64": 60.0}),
    ("H100 PCIe", {"bf16": 756.5, "tf32": 378.0, "fp32": 51.0, "fp64": 51.0}),
    ("H100", {"bf16": 989.5, "tf32": 494.5, "fp32": 67.0, "fp64": 67.0}),
    ("A100", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5, "fp64": 19.5}),
    ("L40S", {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    ("RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
)
