"""Replaces the coefficients of the step-time model that `make gpu` measured on a GPU, from its report.json (bench/gpu/report.py).

`tokenyard plan calibrate=FILE` shows them, and plans with them. What needs several GPUs stays as it was fitted: NVLink, the
network, and what hides behind what.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..moe.config import ModelConfig, MoEConfig
from ..parallel.config import ParallelConfig
from ..train.config.config import ConfigError
from ..train.config.gpus import Gpu, gpu_of_device
from .coefficients import Coefficients, coefficients
from .gpu_cluster import Cluster
from .model_work import ModelWork
from .step_time import BLACKWELL, Tuning, predict
from .workload import BYTES, StepBatch

LAYERS = {
    "qwen3_30b": MoEConfig(experts=128, top_k=8, hidden=768),
    "mixtral": MoEConfig(experts=8, top_k=2, hidden=14336),
    "olmoe": MoEConfig(experts=64, top_k=8, hidden=1024),
}
"""The layers whose time bench/gpu/layers.py measures and that have routed experts alone."""
WIDTHS = {"qwen3_30b": 2048, "mixtral": 4096, "olmoe": 2048}
STEP = ModelConfig(layers=16, width=2048, heads=16, kv_heads=16, vocabulary=32768, moe=MoEConfig(experts=64, top_k=8, hidden=640))
"""The model of bench/gpu/steps.py, which measures it with as many layers as fit."""
FULL = ("Qwen3-30B", "DeepSeek-V3")
"""The heads that bench/gpu/attentions.py measures without windows, documents, sinks or caps."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    path: Path
    gpu: Gpu
    coefficients: Coefficients
    """For Tuning.tokenyard."""
    replaced: Mapping[str, tuple[float, float]]
    """Each replaced coefficient, before and after."""


def calibrate(path: Path) -> Calibration:
    """Returns the fitted coefficients, some replaced by what the report measured. Raises ConfigError for any other file or GPU."""
    try:
        report = json.loads(path.read_text())
        parts: dict[str, list[dict[str, Any]]] = report["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(path, f"cannot be read as the report.json of `make gpu` ({type(error).__name__})") from error
    try:
        name = next((str(one["value"]) for one in parts.get("machine", []) if one.get("name") == "GPU 0"), "")
        gpu = gpu_of_device(name)
        if gpu is None:
            raise _refused(path, f"was measured on {name or 'no GPU'}, which conf/cluster/ does not have")
        before = found = coefficients()
        for measure in (_dense, _scores, _memory, _experts, _host):
            found = dataclasses.replace(found, **dict(measure(parts, gpu, found)))
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise _refused(path, f"has a part that `make gpu` does not write ({type(error).__name__}: {error})") from error
    names = [field.name for field in dataclasses.fields(Coefficients)]
    replaced = {name: (getattr(before, name), getattr(found, name)) for name in names}
    replaced = {name: pair for name, pair in replaced.items() if pair[0] != pair[1]}
    if not replaced:
        raise _refused(path, "has neither layers, attentions, fused nor steps")
    return Calibration(path, gpu, found, replaced)


Parts = Mapping[str, list[dict[str, Any]]]
Found = Iterator[tuple[str, float]]
"""Names of coefficients with their values: none if the report does not have what tells them."""


def _dense(parts: Parts, gpu: Gpu, using: Coefficients) -> Found:
    """The median over layers of dense products with the FLOPs of the experts, as a share of the peak."""
    rates = [row["TFLOP/s"] for row in _rows(parts, "layers") if row["by"] == "dense products"]
    if rates:
        yield f"{_generation(gpu)}_bf16", 1e12 * statistics.median(rates) / gpu.flops["bf16"]


def _scores(parts: Parts, gpu: Gpu, using: Coefficients) -> Found:
    rates = [row["TFLOP/s"] for row in _rows(parts, "attentions") if row["heads"] in FULL]
    if rates:
        yield f"{_generation(gpu)}_scores", 1e12 * statistics.median(rates) / gpu.flops["bf16"]


def _memory(parts: Parts, gpu: Gpu, using: Coefficients) -> Found:
    """What a copy reaches, times the median share of that which the kernels reach."""
    copies = [str(one["value"]) for one in parts.get("fused", []) if one.get("name") == "bytes/s of a copy"]
    shares = [row["of a copy's bytes/s"] for row in _rows(parts, "fused") if "of a copy's bytes/s" in row]
    if copies and shares:
        yield "memory", 1e12 * float(copies[0].split()[0]) * statistics.median(shares) / gpu.memory_bytes_per_second


def _experts(parts: Parts, gpu: Gpu, using: Coefficients) -> Found:
    """The median over layers of what the experts' products reach beyond what their number of rows and columns explains.

    A layer's time is its products and what it moves (plan/workload.py counts the same), at the bandwidth of `_memory`.
    """
    found = []
    for row in _rows(parts, "layers"):
        if row["by"] == "tokenyard" and row["layer"] in LAYERS and "TFLOP/s" in row:
            moe, width, tokens = LAYERS[row["layer"]], WIDTHS[row["layer"]], row["tokens"]
            flops = 3 * 2 * tokens * moe.top_k * 3 * width * moe.hidden
            moved = 3 * BYTES * tokens * moe.top_k * (3 * width + 3 * moe.hidden)
            seconds = flops / (1e12 * row["TFLOP/s"]) - moved / (gpu.memory_bytes_per_second * using.memory)
            rows = tokens * moe.top_k / moe.experts
            expected = rows / (rows + using.half_rows) * moe.hidden / (moe.hidden + using.half_width)
            rate = gpu.flops["bf16"] * getattr(using, f"{_generation(gpu)}_bf16")
            found.append(flops / seconds / rate / expected)
    if found:
        yield "experts", statistics.median(found)


def _host(parts: Parts, gpu: Gpu, using: Coefficients) -> Found:
    """The host's time for a layer, from the step with fewest tokens, if the device waits for the host there.

    The host and the device together take the root of the sum of their squares (plan/step_time.py).
    """
    steps = [row for row in _rows(parts, "steps") if row.get("step") == "eager" and row["micro-batches"] == 1]
    if not steps:
        return
    row = min(steps, key=lambda row: row["tokens"])
    length = row["tokens"]
    work = ModelWork(dataclasses.replace(STEP, layers=row["layers"]), length)
    silent = dataclasses.replace(using, layer_seconds=1e-9)
    alone = predict(work, ParallelConfig(), StepBatch(1, 1), Cluster(gpu, 1), tuning=Tuning.vendor, using=silent)
    took = 1e-3 * float(row["ms (least, most)"].split()[0]) - alone.terms.optimizer
    device = alone.likely - alone.terms.optimizer
    if took > math.sqrt(2) * device:
        host = math.sqrt(took**2 - device**2)
        yield "layer_seconds", host / row["layers"] / using.fixed_layer


def _rows(parts: Parts, part: str) -> Iterator[dict[str, Any]]:
    for one in parts.get(part, []):
        if one.get("kind") == "row":
            yield one["cells"]


def _generation(gpu: Gpu) -> str:
    return "blackwell" if gpu.generation in BLACKWELL else "hopper"


def _refused(path: Path, rule: str) -> ConfigError:
    return ConfigError.of("calibrate", path, rule, 'calibrate=gpu-report/report.json after `make gpu ARGS="--out gpu-report"`')
