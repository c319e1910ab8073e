"""The peak FLOP/s of the devices, by which MFU is defined: from data sheets, otherwise measured by a short matrix product."""

import math
import os
from time import perf_counter
from typing import NamedTuple

import torch

from ...moe.linear import compute_dtype
from ..config.gpus import gpu_of_device


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
    return Peak(measure(device, dtype) * ranks, f"measured by a matrix product, {name} is not in conf/cluster/")


def data_sheet(name: str, mode: str) -> float | None:
    """Returns the dense peak of the CUDA device `name` in FLOP/s in `mode` (bf16, tf32, fp32, fp64), if conf/cluster/ has one."""
    try:
        found = gpu_of_device(name)
    except ImportError:  # `make gpu` runs without Hydra and so without PyYAML
        return None
    return found.flops.get(mode) if found else None


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
